#!/usr/bin/env bash
# Run a command on every worker of every slice, in the repository, with its Python first on PATH.
#
#   tpu_scripts/run.sh [--dry-run] [--detach] [--id ID] [--env FILE] -- COMMAND [ARGUMENT...]
#   tpu_scripts/run.sh --attach | --stop [--no-wait] [--id ID] [--env FILE]
#   tpu_scripts/run.sh -- python -m experiments.train imagen.base64 --preset 300m --text google/flan-t5-xxl --text-dtype bfloat16 --dtype bfloat16 --out /mnt/bucket/runs/base64
#
#   --dry-run   print the exact commands and run none
#   --detach    start it and return
#   --attach    follow the run in progress, or report how the last one ended
#   --stop      send SIGTERM to the command on every worker (training saves), then wait for its end
#   --no-wait   with --stop: do not wait for its end
#   --id ID     the run's name, by default the time; a name is never started twice
#   --env FILE  settings to read instead of tpu_scripts/tpu.env (or $TPU_ENV); see tpu.env.example
#
# The command continues if the connection ends; one run at a time. Its output is shown with the prefix [SLICE/WORKER],
# and saved in runs/tpu/NAME/ID/SLICE-WORKER.log here and in runs/tpu/ID.log on each worker.
# Exit code: 0 if all workers ended with 0; 75 if any returned 75 (saved, start again); 255 if a worker is unreachable;
# otherwise the first failure's; 71 if the only failures are lost processes, or a worker restarted.

set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

parse "--detach --attach --stop --no-wait --id=" "$@"
[[ $ID =~ ^[-A-Za-z0-9_.]*$ ]] || fail "--id '$ID': letters, digits, dots and dashes only"
if [[ $ATTACH == true || $STOP == true ]]; then
  ((${#REST[@]} == 0)) || fail "a command and --attach or --stop: one of them"
  needs gcloud
else
  ((${#REST[@]})) || fail "no command: put it behind --"
  check_passed
  needs gcloud
  ID=${ID:-$(date -u +%Y%m%d-%H%M%S)}
fi
scratch=$(mktemp -d)
trap 'rm -rf -- "$scratch"' EXIT

on_worker() {
  on_workers "cd jaxdiff && tpu_scripts/worker.sh $1"
}

# The variables named by TPU_PASS are sent in a file that only its owner can read, never in a command line.
send_variables() {
  local name
  ((${#PASSED[@]})) || return 0
  for name in "${PASSED[@]}"; do
    printf '# jaxdiff.env: %s=***\n' "$name"
    (umask 077 && printf 'export %s=%s\n' "$name" "$(quoted "${!name}")" >>"$scratch/jaxdiff.env")
  done
  to_workers "$scratch/jaxdiff.env" jaxdiff.env
}

# Start on all workers or on none. The workers reject a second run.
start() {
  local code=0
  local mount=
  send_variables
  # A restarted worker has lost the mount, and would write to the local folder.
  if [[ -n $TPU_BUCKET ]]; then mount="mount $TPU_BUCKET && tpu_scripts/worker.sh "; fi
  on_worker "${mount}start $ID $(line_of "${REST[@]}")" || code=$?
  if ((code)); then
    on_worker "stop $ID" || true
    fail "not started on every worker, so stopped on those where it was" "$code"
  fi
}

# follow [LINES]: until the end on every reachable worker. (Without awk, as some versions read ahead.)
follow() {
  local logs=$LOGS_AT/${ID:-last} line
  if [[ $DRY_RUN == false ]]; then mkdir -p "$logs"; fi
  on_worker "follow ${ID:-last}${1:+ $1}" | while IFS= read -r line; do
    printf '%s\n' "$line"
    if [[ $line =~ ^\[([0-9]+)/([^]/\ ]+)\]\ (.*)$ ]]; then
      printf '%s\n' "${BASH_REMATCH[3]}" >>"$logs/${BASH_REMATCH[1]}-${BASH_REMATCH[2]}.log"
    fi
  done
}

# The state of the run on each worker, one line "SLICE/WORKER ID CODE" each; fails if a worker is unreachable.
codes() {
  local code=0
  on_worker "code ${ID:-last}" >"$scratch/codes" || code=$?
  sed -n 's/^@ //p' "$scratch/codes" | sort -t/ -k1,1n -k2,2n
  return "$code"
}

# The common exit code of lines of codes. $2: whether all workers were reached.
common_code() {
  printf '%s\n' "$1" | awk -v reached="$2" '
    $3 == 75 { saved = 1; next }
    # 134: jax aborts a process whose coordinator has lost another. lost, none: the worker was restarted.
    $3 == 71 || $3 == 134 || $3 == "lost" || $3 == "none" { broken_off = 1; next }
    $3 ~ /^[0-9]+$/ && $3 != 0 && !failed { failed = $3 }
    $3 !~ /^[0-9]+$/ { reached = "false" }
    END { print saved ? 75 : reached == "false" ? 255 : failed && failed < 128 ? failed : broken_off ? 71 : failed + 0 }'
}

# Follow to the end and return the common exit code. Reconnects if the connection breaks during the run.
finish() {
  local said reached code broken=0 lines=${1:-}
  while true; do
    follow "$lines" || true
    reached=true
    said=$(codes) || reached=false
    [[ $DRY_RUN == false ]] || return 0
    if [[ $said != *" running"* || $reached == false ]] || ((++broken > 100)); then break; fi
    lines=10
    sleep "$TPU_POLL_SECONDS"
  done
  if ! grep -qv ' none$' <<<"$said"; then # no pipe, which grep may close before everything is written
    printf 'no run %s on %s\n' "${ID:-at all}" "$TPU_NAME"
    return $((${#ID} ? 71 : 0))
  fi
  code=$(common_code "$said" "$reached")
  if ((code)); then
    printf '%s\n' "$said" | awk '{ print $1 ": exit code " $3 }' >&2
    [[ $reached == true ]] || printf 'not all workers could be reached\n' >&2
  fi
  return "$code"
}

code=0
if [[ $STOP == true ]]; then
  on_worker "stop ${ID:-last}" || true # finish reports unreachable workers
  [[ $NO_WAIT == false ]] || exit 0
  finish 10 || code=$?
  if ((code == 255 || code == 71)); then exit "$code"; fi
elif [[ $ATTACH == true ]]; then
  finish 100 || exit $?
else
  start
  if [[ $DETACH == true ]]; then
    printf 'run %s is in progress; run.sh --attach follows it\n' "$ID"
  else
    finish || exit $?
  fi
fi
