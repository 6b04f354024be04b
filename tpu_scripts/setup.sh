#!/usr/bin/env bash
# Put the committed state of this repository on every worker of every slice, install it there, and check the pod.
# Run it again to update.
#
#   tpu_scripts/setup.sh [--dry-run] [--env FILE]
#
#   --dry-run   print the exact commands and run none
#   --env FILE  settings to read instead of tpu_scripts/tpu.env (or $TPU_ENV); see tpu.env.example
#
# The images' own Python is too old; uv installs the one of TPU_PYTHON beside it, with the exact versions of
# constraints.txt. With TPU_BUCKET, the bucket is mounted at /mnt/bucket. It ends with smoke.py, which joins all workers
# and fails unless every one sees all devices of the pod; each worker's log is kept as run.sh keeps it.

set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

parse "" "$@"
needs git gcloud
if [[ -n $(git -C "$ROOT" status --porcelain) ]]; then
  printf 'warning: changes that are not committed stay here\n' >&2
fi
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
archive=$folder/jaxdiff.tar.gz
call git -C "$ROOT" archive --format=tar.gz "--output=$archive" HEAD
to_workers "$archive" jaxdiff.tar.gz
# Not under a run in progress. Old sources go, so that what a commit deleted is not imported.
install="{ [ ! -x jaxdiff/tpu_scripts/worker.sh ] || jaxdiff/tpu_scripts/worker.sh idle; }"
install+=" && mkdir -p jaxdiff && cd jaxdiff && rm -rf jaxdiff experiments tests tpu_scripts"
install+=" && tar -xzf ../jaxdiff.tar.gz"
if [[ -n ${TPU_SETUP:-} ]]; then install+=" && { $TPU_SETUP; }"; fi
if [[ -n $TPU_BUCKET ]]; then install+=" && tpu_scripts/worker.sh mount $TPU_BUCKET"; fi
# The newer images refuse pip outside of an environment; older pips ignore the variable.
install+=" && PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv"
install+=" && ~/.local/bin/uv venv --quiet --allow-existing --python $(quoted "${TPU_PYTHON:-3.12}") .venv"
install+=" && ~/.local/bin/uv pip install --quiet --python .venv/bin/python"
install+=" -c tpu_scripts/constraints.txt -e '.[tpu,bucket]'"
on_workers "$install"
number=$(devices)
flags=()
if [[ $DRY_RUN == true ]]; then flags=(--dry-run); fi
"$HERE/run.sh" ${flags[@]+"${flags[@]}"} --id "smoke-$(date -u +%Y%m%d-%H%M%S)" --env "$ENV_FILE" -- \
  python tpu_scripts/smoke.py ${number:+--devices "$number"} || {
  code=$?
  printf "error: the pod's smoke test failed (each worker's log is in %s)\n" "$LOGS_AT" >&2
  exit "$code"
}
