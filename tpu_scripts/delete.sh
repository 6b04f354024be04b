#!/usr/bin/env bash
# Delete the queued resource with its machines and their disks, after you type its name.
#
#   tpu_scripts/delete.sh [--dry-run] [--yes] [--env FILE]
#
#   --dry-run   print the exact commands and run none
#   --yes       do not ask
#   --env FILE  settings to read instead of tpu_scripts/tpu.env (or $TPU_ENV); see tpu.env.example
#
# The bucket of TPU_BUCKET is not changed.

set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

parse "--yes" "$@"
needs gcloud
if [[ $YES == false && $DRY_RUN == false ]]; then
  printf 'Delete %s in %s and everything on it? Type its name: ' "$TPU_NAME" "$TPU_ZONE" >&2
  read -r answer || true
  [[ ${answer:-} == "$TPU_NAME" ]] || fail "not deleted"
fi
state=$(pod_state shown)
if [[ $state == ABSENT && $DRY_RUN == false ]]; then
  if ((TPU_SLICES == 1)) && [[ -n $(node_states) ]]; then # created without a queued resource
    call gcloud compute tpus tpu-vm delete "$TPU_NAME" "${PLACE[@]}" --quiet
  else
    printf 'there is no %s in %s\n' "$TPU_NAME" "$TPU_ZONE"
  fi
elif [[ $state == DELETING ]]; then
  printf '%s is being deleted\n' "$TPU_NAME"
  while [[ $state == DELETING ]]; do
    sleep "$TPU_POLL_SECONDS"
    state=$(pod_state)
  done
else
  call gcloud compute tpus queued-resources delete "$TPU_NAME" "${PLACE[@]}" --force --quiet
fi
