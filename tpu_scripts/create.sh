#!/usr/bin/env bash
# Create the TPU that the env file describes.
#
#   tpu_scripts/create.sh [--dry-run] [--env FILE]
#
#   --dry-run   print the exact commands and run none
#   --env FILE  settings to read instead of tpu_scripts/tpu.env (or $TPU_ENV); see tpu.env.example
#
# It costs money from now until delete.sh.

set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

parse "" "$@"
spot=()
if [[ ${TPU_SPOT:-false} == true ]]; then spot=(--spot); fi
call gcloud compute tpus tpu-vm create "$TPU_NAME" "${PLACE[@]}" \
  "--accelerator-type=$TPU_TYPE" "--version=$TPU_VERSION" ${spot[@]+"${spot[@]}"}
