#!/usr/bin/env bash
# Request the TPU of the env file as a queued resource, and wait until it is ACTIVE.
#
#   tpu_scripts/create.sh [--dry-run] [--no-wait] [--env FILE]
#
#   --dry-run   print the exact commands and run none
#   --no-wait   return when the request is in the queue
#   --env FILE  settings to read instead of tpu_scripts/tpu.env (or $TPU_ENV); see tpu.env.example
#
# Run again, it creates nothing twice: it reports the state and continues to wait. Exit code 1 with the reason if the
# request failed, was suspended or its machines were preempted: delete.sh removes what is left. 69 if gcloud fails
# repeatedly: the request is unchanged.
# The TPU costs money from ACTIVE until delete.sh.

set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

parse "--no-wait" "$@"
needs gcloud
if [[ $TPU_TYPE == tpu7x* ]]; then
  fail "TPU_TYPE $TPU_TYPE: Google gives out TPU7x through Kubernetes alone; gke.sh runs there"
fi

request() {
  local flags=("--accelerator-type=$TPU_TYPE" "--runtime-version=$TPU_VERSION")
  if ((TPU_SLICES > 1)); then
    flags+=("--node-count=$TPU_SLICES" "--node-prefix=$TPU_NAME")
  else
    flags+=("--node-id=$TPU_NAME")
  fi
  if [[ ${TPU_SPOT:-} == true ]]; then flags+=(--spot); fi
  if [[ ${TPU_RESERVED:-} == true ]]; then flags+=(--reserved); fi
  # gcloud ignores the end of the interval without a start.
  if [[ -n ${TPU_VALID_UNTIL:-} ]]; then
    flags+=(--valid-after-duration=1m "--valid-until-duration=$TPU_VALID_UNTIL")
  fi
  words_of "${TPU_CREATE_FLAGS:-}"
  flags+=(${WORDS[@]+"${WORDS[@]}"})
  call gcloud compute tpus queued-resources create "$TPU_NAME" "${PLACE[@]}" "${flags[@]}"
}

# Print the reason why a request failed, and exit.
came_to_nothing() {
  printf '%s: %s\n' "$TPU_NAME" "$1" >&2
  call gcloud compute tpus queued-resources describe "$TPU_NAME" "${PLACE[@]}" "--format=yaml(state)" >&2 || true
  fail "$TPU_NAME is $1 (the reason is above); delete.sh removes it, then create.sh asks again" 1
}

wait_until_active() {
  local state last='' began=$SECONDS broken=0 first=shown
  while true; do
    if state=$(pod_state $first); then
      broken=0
    else
      ((++broken < 5)) || fail "gcloud failed five times in a row; the request may still be in the queue" 69
      state=${last:-unknown}
    fi
    first=
    if [[ $state != "$last" ]]; then
      printf '%s: %s (after %s s)\n' "$TPU_NAME" "$state" $((SECONDS - began))
    elif [[ -t 1 ]]; then
      printf '%s: %s (after %s s)\r' "$TPU_NAME" "$state" $((SECONDS - began))
    fi
    last=$state
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING | PREEMPTED | ABSENT) came_to_nothing "$state" ;;
    esac
    sleep "$TPU_POLL_SECONDS"
  done
}

if [[ $DRY_RUN == true ]]; then
  pod_state shown >/dev/null
  request
  if [[ $NO_WAIT == false ]]; then pod_state shown >/dev/null; fi
  exit
fi
state=$(pod_state shown) || {
  fail "gcloud does not say whether $TPU_NAME is there" 69
}
if [[ $state == ABSENT ]]; then
  request || { # the creation may have succeeded although gcloud failed, or happened elsewhere at the same time
    code=$?
    state=$(pod_state)
    [[ $state != ABSENT ]] || exit "$code"
  }
else
  printf '%s is there already: %s\n' "$TPU_NAME" "$state"
fi
case $state in FAILED | SUSPEND* | DELETING | PREEMPTED) came_to_nothing "$state" ;; esac
if [[ $NO_WAIT == false && $state != ACTIVE ]]; then wait_until_active; fi
