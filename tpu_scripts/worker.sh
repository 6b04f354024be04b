#!/usr/bin/env bash
# On a worker: start a run, follow it, report how it ended. Called by the other scripts over ssh.
#
#   worker.sh start ID COMMAND [ARGUMENT...]   one run at a time; the same ID is never started twice
#   worker.sh follow ID|last [LINES]           print its output, all or the last LINES, until it ends
#   worker.sh code ID|last                     prints "@ SLICE/WORKER ID CODE"; CODE may be running, lost or none
#   worker.sh stop ID|last                     send SIGTERM to the command
#   worker.sh idle                             fails while a run is in progress
#   worker.sh mount BUCKET                     mount a bucket at /mnt/bucket
#
# Runs are in runs/tpu: ID.log, ID.code, and `lock`, which is held during a run.

set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
runs=runs/tpu
me=${SLICE:-0}/${HOSTNAME##*-w-}
mkdir -p "$runs"
touch "$runs/lock"

say() {
  printf '%s: %s\n' "$me" "$1" >&2
}

busy() {
  ! flock --shared --nonblock "$runs/lock" true
}

id_of() {
  if [[ $1 == last ]]; then cat "$runs/last" 2>/dev/null || true; else printf '%s' "$1"; fi
}

start() {
  local id=$1
  shift
  if [[ -f ~/jaxdiff.env ]]; then
    # shellcheck source=/dev/null
    source ~/jaxdiff.env
    rm -f ~/jaxdiff.env
  fi
  if [[ -e $runs/$id.log ]]; then
    say "run $id was started before"
    return
  fi
  exec 9>>"$runs/lock"
  if ! flock --wait 2 9; then
    say "run $(id_of last) is in progress; run.sh --attach follows it, run.sh --stop ends it"
    exit 3
  fi
  printf '%s' "$id" >"$runs/last"
  : >"$runs/$id.log"
  nohup setsid tpu_scripts/worker.sh hold "$id" "$@" >>"$runs/$id.log" 2>&1 </dev/null &
  printf '%s' "$!" >"$runs/$id.holder"
}

# Holds the lock (descriptor 9) while the command runs. This shell ignores signals until the command has ended, as the
# command gets its own, and the exit code must be written.
hold() {
  local id=$1 code=0
  shift
  trap : TERM INT HUP
  # shellcheck disable=SC2016  # for the inner shell
  PATH=$PWD/.venv/bin:$PATH bash -c 'printf "%s" $$ >"$0" && exec "$@"' "$runs/$id.pid" "$@" 9>&- || code=$?
  printf '%s' "$code" >"$runs/$id.code.part"
  mv -- "$runs/$id.code.part" "$runs/$id.code"
}

follow() {
  local id from=${2:-+1}
  id=$(id_of "$1")
  if [[ -z $id || ! -e $runs/$id.log ]]; then
    say "no run to follow"
    return
  fi
  {
    if busy && [[ $(id_of last) == "$id" ]]; then
      tail -n "$from" -f -s 0.2 "--pid=$(cat "$runs/$id.holder")" "$runs/$id.log"
    else
      tail -n "$from" "$runs/$id.log"
    fi
  } | stdbuf -oL tr '\r' '\n' | sed -u "s|^|[$me] |"
}

code() {
  local id code=none
  id=$(id_of "$1")
  if [[ -n $id && -e $runs/$id.log ]]; then
    if [[ -e $runs/$id.code ]]; then
      code=$(cat "$runs/$id.code")
    elif busy && [[ $(id_of last) == "$id" ]]; then
      code=running
    else
      code=lost
    fi
  fi
  printf '@ %s %s %s\n' "$me" "${id:--}" "$code"
}

stop() {
  local id tries=0
  id=$(id_of "$1")
  if ! busy || [[ $(id_of last) != "$id" ]]; then return; fi
  until [[ -s $runs/$id.pid ]] || ((++tries > 50)); do sleep 0.1; done
  say "SIGTERM to run $id"
  kill -TERM "$(cat "$runs/$id.pid")" 2>/dev/null || true
}

idle() {
  if busy; then
    say "run $(id_of last) is in progress"
    exit 3
  fi
}

# No caching of names: all workers must see each other's writes at once. Orbax renames folders.
mount() {
  local tries=0 at=/mnt/bucket list=/etc/apt/sources.list.d/gcsfuse.list key=/usr/share/keyrings/cloud.google.asc
  if mountpoint -q "$at"; then return; fi
  if ! command -v gcsfuse >/dev/null; then
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
    printf 'deb [signed-by=%s] https://packages.cloud.google.com/apt gcsfuse-%s main\n' "$key" "$(lsb_release -cs)" |
      sudo tee "$list" >/dev/null
    # A new machine may still be updating itself.
    until sudo apt-get -qq update; do
      ((++tries < 20)) || return 1
      sleep 15
    done
    sudo apt-get -qq -y -o DPkg::Lock::Timeout=600 install gcsfuse
  fi
  sudo mkdir -p "$at"
  sudo chown "$(id -u):$(id -g)" "$at"
  gcsfuse --implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
    "$1" "$at"
}

"$@"
