#!/usr/bin/env bash
# Copy a run's folder from the first worker, or from a bucket, to this machine. Run it again to resume.
#
#   tpu_scripts/fetch.sh [--dry-run] [--checkpoints] [--into FOLDER] [--env FILE] RUN
#   tpu_scripts/fetch.sh runs/base64                      # from the disk of the first worker
#   tpu_scripts/fetch.sh /mnt/bucket/runs/base64/model    # from the bucket of TPU_BUCKET; the TPU may be gone
#   tpu_scripts/fetch.sh gs://bucket/runs/base64
#
#   --dry-run      print the exact commands and run none
#   --checkpoints  also copy checkpoints, which are large; without it they are skipped unless RUN is inside them
#   --into FOLDER  target folder, by default RUN's path in this repository: runs/base64
#   --env FILE     settings to read instead of tpu_scripts/tpu.env (or $TPU_ENV); see tpu.env.example

set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

parse "--checkpoints --into= WORDS" "$@"
((${#REST[@]} == 1)) || fail "one RUN to fetch, such as runs/base64"
run=${REST[0]%/}
if [[ $run == /mnt/bucket/* ]]; then
  [[ -n $TPU_BUCKET ]] || fail "$run is in a bucket, and $ENV_FILE does not set TPU_BUCKET"
  run=gs://$TPU_BUCKET/${run#/mnt/bucket/}
fi
[[ $run != gs://* || $run == gs://*/* ]] || fail "$run is a whole bucket; name a folder in it"
within=${run#gs://*/}
[[ $run != /* ]] || within=$(basename -- "$run")
into=${INTO:-$ROOT/$within}
needs gcloud
[[ $run == gs://* ]] || needs rsync
if [[ $DRY_RUN == false ]]; then mkdir -p -- "$into"; fi
if [[ $run == gs://* ]]; then
  without=()
  if [[ $CHECKPOINTS == false ]]; then without=("--exclude=^(.*/)?checkpoints/.*"); fi
  call gcloud storage rsync --recursive ${without[@]+"${without[@]}"} "$run" "$into"
else
  without=()
  if [[ $CHECKPOINTS == false ]]; then without=(--exclude=checkpoints/); fi
  if [[ $run != /* ]]; then run=jaxdiff/$run; fi
  export TPU_ENV=$ENV_FILE
  call rsync --archive --partial --compress "--rsh=$(quoted "$HERE/rsh.sh")" ${without[@]+"${without[@]}"} \
    "${NODES[0]}:$run/" "$into/"
fi
