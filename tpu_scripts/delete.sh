#!/usr/bin/env bash
# Delete the TPU with all that is on its disks, after you have typed its name.
#
#   tpu_scripts/delete.sh [--dry-run] [--yes] [--env FILE]
#
#   --dry-run   print the exact commands and run none
#   --yes       do not ask
#   --env FILE  settings to read instead of tpu_scripts/tpu.env (or $TPU_ENV); see tpu.env.example

set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

parse "--yes" "$@"
if [[ $YES == false && $DRY_RUN == false ]]; then
  printf 'Delete %s in %s and everything on it? Type its name: ' "$TPU_NAME" "$TPU_ZONE" >&2
  read -r answer || true
  [[ ${answer:-} == "$TPU_NAME" ]] || fail "not deleted"
fi
call gcloud compute tpus tpu-vm delete "$TPU_NAME" "${PLACE[@]}" --quiet
