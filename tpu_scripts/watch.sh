#!/usr/bin/env bash
# Create the TPU, set it up, run a command there, and repeat this whenever the TPU is preempted, until the command has
# ended or the budget is used up.
#
#   tpu_scripts/watch.sh [--dry-run] [--delete] [--env FILE] -- COMMAND [ARGUMENT...]
#
#   --dry-run   print the exact commands of one round and run none
#   --delete    delete the TPU at the end, however the command ended
#   --env FILE  settings to read instead of tpu_scripts/tpu.env (or $TPU_ENV); see tpu.env.example
#
# The command must resume from storage that outlives the TPU, such as --out /mnt/bucket/runs/base64.
# Restarted after: 75 (saved); a failed connection or a killed command if the TPU is gone; 71 (workers lost each other,
# or a stall) unless the three previous rounds were also short. Any other exit code ends and is returned (0: finished,
# 73: another run writes to this --out). The wait between rounds doubles after each short round. Budget:
# TPU_MAX_RESTARTS, TPU_MAX_HOURS, TPU_MAX_DOLLARS. When it is used up, the command saves on SIGTERM, the TPU is
# deleted, and the exit code is 75. If this script is killed, start it again with the same command: it follows the run
# on the TPU, creates nothing twice, and keeps counting the budget. Its state is in runs/tpu/NAME/watch. Ctrl-C leaves
# the TPU running.

set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

parse "--delete" "$@"
((${#REST[@]})) || fail "no command: put it behind --"
command=$(line_of "${REST[@]}")
flags=(--env "$ENV_FILE")
check_passed

if [[ $DRY_RUN == true ]]; then
  "$HERE/create.sh" --dry-run "${flags[@]}"
  "$HERE/setup.sh" --dry-run "${flags[@]}"
  "$HERE/run.sh" --dry-run "${flags[@]}" -- "${REST[@]}"
  "$HERE/delete.sh" --dry-run "${flags[@]}"
  exit
fi

needs git gcloud
[[ -n $TPU_BUCKET ]] ||
  printf 'warning: no TPU_BUCKET; what is on the disks of a TPU that is taken away is lost\n' >&2

# State that must survive a kill. `since`: when the current TPU was first seen ACTIVE, 0 if there is none; `seconds`:
# lifetime of the earlier ones. `id`: the run on this TPU, set before it is started.
state_file=$LOGS_AT/watch
restarts=0 seconds=0 since=0 short=0 set_up=false id=''

save_state() {
  {
    printf 'restarts=%s seconds=%s since=%s short=%s set_up=%s id=%s\n' \
      "$restarts" "$seconds" "$since" "$short" "$set_up" "$id"
    printf 'saved_command=%s\n' "$(quoted "$command")"
  } >"$state_file.part"
  mv -- "$state_file.part" "$state_file"
}

# Start time of a process, as its number can be reused.
began_at() {
  if [[ -r /proc/$1/stat ]]; then
    sed 's/.*) //' "/proc/$1/stat" | cut -d ' ' -f 20
  else
    ps -o lstart= -p "$1" 2>/dev/null || true
  fi
}

# One watcher at a time: watch.pid has its process number and start time.
only_one() {
  local other='' began=''
  if [[ -f $state_file.pid ]]; then { read -r other && read -r began; } <"$state_file.pid" || true; fi
  if [[ $other =~ ^[1-9][0-9]*$ ]] && kill -0 "$other" 2>/dev/null; then
    if [[ -z $began || $began == "$(began_at "$other")" ]]; then
      fail "process $other watches $TPU_NAME already; if it does something else, delete $state_file.pid"
    fi
    printf 'the process that watched %s is gone; its number %s is now that of another\n' "$TPU_NAME" "$other"
  fi
}

load_state() {
  local saved_command
  mkdir -p "$LOGS_AT"
  if [[ -f $state_file ]]; then
    # shellcheck source=/dev/null
    source "$state_file"
    [[ $saved_command == "$command" ]] ||
      fail "$TPU_NAME is watched for another command: $saved_command (delete $state_file to give that up)"
    printf 'going on: %s restarts and %s s of TPU time so far\n' "$restarts" "$(used)"
  fi
  printf '%s\n%s\n' "$$" "$(began_at $$)" >"$state_file.pid"
}

# Seconds of TPU time so far.
used() {
  local now
  now=$(date +%s)
  printf '%s' $((seconds + (since > 0 ? now - since : 0)))
}

# Whether TPU time is used up; prints a line if so.
no_time_left() {
  local most
  most=$(awk -v hours="${TPU_MAX_HOURS:-}" -v dollars="${TPU_MAX_DOLLARS:-}" \
    -v price="${TPU_DOLLARS_PER_HOUR:-}" 'BEGIN {
    most = -1
    if (hours != "") most = hours * 3600
    if (dollars != "" && (most < 0 || dollars / price * 3600 < most)) most = dollars / price * 3600
    printf "%d", most
  }')
  ((most >= 0 && $(used) >= most)) || return 1
  printf 'the budget of %s s of TPU time is used up\n' "$most" >&2
}

remove() {
  local tries=0 # a request in suspension cannot always be deleted yet
  until "$HERE/delete.sh" --yes "${flags[@]}"; do
    if ((++tries == 10)); then
      rm -f -- "$state_file.pid"
      fail "$TPU_NAME could not be deleted: it may go on costing money" 1
    fi
    patiently "$tries"
  done
  seconds=$(used)
  since=0 set_up=false id=''
  save_state
}

# Report what is left at the end, and whether it costs money. If one of several slices is preempted, the others remain.
what_is_left() {
  local state nodes left=0
  state=$(pod_state) || state=UNKNOWN
  if [[ $state == PREEMPTED ]]; then
    if nodes=$(node_states); then
      left=$(printf '%s\n' "$nodes" | awk 'NF && $2 !~ /^(PREEMPTED|TERMINATED|STOPPED|DELETING)$/' | wc -l)
    else
      state=UNKNOWN
    fi
  fi
  if ((left)); then
    printf '%s of %s slices of %s are still there and cost money until delete.sh\n' $((left)) "$TPU_SLICES" "$TPU_NAME"
    return
  fi
  case $state in
    ABSENT) printf 'there is no %s: nothing costs money\n' "$TPU_NAME" ;;
    FAILED) printf 'the request %s FAILED: it costs nothing, and delete.sh removes it\n' "$TPU_NAME" ;;
    SUSPEND* | PREEMPTED)
      printf 'the machines of %s were taken away (%s): delete.sh removes the request\n' "$TPU_NAME" "$state"
      ;;
    DELETING) printf '%s is being deleted\n' "$TPU_NAME" ;;
    UNKNOWN)
      printf 'gcloud does not say whether %s is there: it may cost money until delete.sh\n' "$TPU_NAME"
      ;;
    ACTIVE | STARTING) printf 'the TPU %s is still there and costs money until delete.sh\n' "$TPU_NAME" ;;
    *)
      printf 'the request %s is still in the queue (%s): it costs money once it is ACTIVE, unless delete.sh takes it back\n' \
        "$TPU_NAME" "$state"
      ;;
  esac
}

# end CODE: the command has ended, or the budget is used up.
end() {
  local code=$1
  if [[ $DELETE == true || $over == true ]]; then
    remove
  else
    what_is_left >&2
  fi
  printf 'ended with exit code %s after %s restarts and %s s of TPU time\n' "$code" "$restarts" "$(used)"
  rm -f -- "$state_file" "$state_file.pid"
  if ((code == 73)); then printf 'not again: another run writes to this --out; OUT/run.lock says which\n' >&2; fi
  exit "$code"
}

follower=
leave() {
  if [[ -n $follower ]]; then kill -TERM -- "-$follower" 2>/dev/null || true; fi
  rm -f -- "$state_file.pid"
  printf '\nno longer watched; %s, or its request, is left as it is, and what runs there goes on. ' "$TPU_NAME" >&2
  printf 'The same command watches again\n' >&2
  exit 130
}

pause() {
  sleep "$1" &
  wait $! || true
}

# Run a script of this folder in its own process group while checking the budget. Sets `code`. After SIGTERM the command
# has TPU_STOP_SECONDS to save.
over=false
guarded() {
  local script=$HERE/$1.sh told=0
  shift
  code=0
  set -m
  "$script" "${flags[@]}" "$@" &
  follower=$!
  set +m
  while kill -0 "$follower" 2>/dev/null; do
    if [[ $over == false ]] && no_time_left; then
      over=true told=$SECONDS
      "$HERE/run.sh" --stop --no-wait "${flags[@]}" || true
    elif [[ $over == true ]] && ((SECONDS - told > ${TPU_STOP_SECONDS:-900})); then
      printf 'it has not ended %s s after SIGTERM\n' "${TPU_STOP_SECONDS:-900}" >&2
      kill -TERM -- "-$follower" 2>/dev/null || true
    fi
    pause "$TPU_POLL_SECONDS"
  done
  wait "$follower" || code=$?
  follower=
}

# Wait; after the first tries increasingly long, up to TPU_BACKOFF_MOST. $1: number of previous tries.
patiently() {
  local seconds=$TPU_POLL_SECONDS most=${TPU_BACKOFF_MOST:-1800}
  if (($1 > 3)); then
    seconds=$((${TPU_BACKOFF_SECONDS:-30} << ($1 < 14 ? $1 - 4 : 10)))
    seconds=$((seconds < most ? seconds : most))
  fi
  pause "$seconds"
}

# The pod's state in `state`. A failing gcloud is retried, without limit once something has been created.
look() {
  local tries=0
  until state=$(pod_state); do
    printf 'gcloud does not say how %s is\n' "$TPU_NAME" >&2
    if [[ ! -f $state_file ]] && ((tries == 4)); then
      rm -f -- "$state_file.pid"
      fail "nothing was done" 1
    fi
    patiently $((tries++))
  done
  case $state in ABSENT | SUSPENDING | SUSPENDED | DELETING | PREEMPTED) gone=true ;; *) gone=false ;; esac
}

# One round, up to the command's end. Sets `code`, and `phase` to the script that returned it.
round() {
  local tries=0
  phase=create code=0
  save_state
  if [[ $state != ACTIVE ]]; then guarded create; fi
  while ((code == 69)) && [[ $over == false ]]; do
    patiently $((tries++))
    guarded create
  done
  if ((code)) || [[ $over == true ]]; then return; fi
  if ((since == 0)); then since=$(date +%s); fi
  began=$(date +%s)
  save_state
  if [[ $set_up == false ]]; then
    phase=setup
    guarded setup
    if ((code)) && [[ $over == false ]]; then # retry once, as a machine may not have been ready
      look
      if [[ $gone == true ]]; then return; fi
      pause "$TPU_POLL_SECONDS"
      guarded setup
    fi
    if ((code)) || [[ $over == true ]]; then return; fi
    set_up=true id=$(date -u +%Y%m%d-%H%M%S)-$restarts
    save_state
  fi
  phase=run
  guarded run --id "$id" -- "${REST[@]}"
  # Unreachable, but it exists: the command may still be running.
  tries=0
  while ((code == 255)) && [[ $over == false ]]; do
    look
    if [[ $gone == true ]]; then break; fi
    patiently $((tries++))
    guarded run --attach --id "$id"
  done
}

# Whether the round ended because the TPU was preempted or stalled, by `code`, `phase` and `gone`.
taken_away() {
  if [[ $phase == run && $code == 75 ]] || { [[ $phase == run && $code == 71 ]] && ((short < 3)); }; then return 0; fi
  [[ $gone == true ]] || return 1
  case $phase in
    create) [[ $state != ABSENT ]] ;;
    setup) true ;;
    run) ((code >= 128 || code == 71)) ;;
  esac
}

only_one
load_state
trap leave INT TERM
began=$(date +%s)
while true; do
  look
  if [[ $gone == true ]]; then
    # A leftover request, or machines that were preempted while nothing was watching.
    if [[ $state != ABSENT ]]; then remove; fi
    seconds=$(used) since=0 set_up=false id='' state=ABSENT
  fi
  phase=create code=75
  if no_time_left; then over=true; else round; fi
  if [[ $over == true && $phase != run ]]; then end 75; fi
  if ((code == 0)); then end 0; fi
  most=${TPU_BACKOFF_MOST:-1800}
  if (($(date +%s) - began > most)); then short=0; fi
  look
  # Ended by the budget, whether it reacted to SIGTERM or was killed.
  if [[ $over == true ]] && ((code >= 128 || code == 71)); then end 75; fi
  if [[ $over == true ]] || ! taken_away; then end "$code"; fi
  if [[ $gone == true ]]; then remove; fi
  if no_time_left || { [[ -n ${TPU_MAX_RESTARTS:-} ]] && ((restarts >= TPU_MAX_RESTARTS)); }; then
    printf 'the budget is used up after %s restarts\n' "$restarts" >&2
    over=true
    end 75
  fi
  wait_for=$((${TPU_BACKOFF_SECONDS:-30} << (short < 20 ? short : 20)))
  restarts=$((restarts + 1)) short=$((short + 1)) set_up=false id=''
  save_state
  wait_for=$((wait_for < most ? wait_for : most))
  printf 'the TPU was taken away or is to be started again (exit code %s): restart %s in %s s\n' \
    "$code" "$restarts" "$wait_for"
  pause "$wait_for"
done
