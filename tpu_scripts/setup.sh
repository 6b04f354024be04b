#!/usr/bin/env bash
# Copy the committed state of this repository to every worker of every slice, install it, and check the pod.
# Run it again to update.
#
#   tpu_scripts/setup.sh [--dry-run] [--env FILE]
#
#   --dry-run   print the exact commands and run none
#   --env FILE  settings to read instead of tpu_scripts/tpu.env (or $TPU_ENV); see tpu.env.example
#
# The Python of the images is too old; uv installs that of TPU_PYTHON, with the exact versions of constraints.txt. With
# TPU_BUCKET, the bucket is mounted at /mnt/bucket. At the end smoke.py joins all workers and fails unless each sees all
# devices of the pod; the workers' logs are saved as by run.sh.

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
# Not during a run. Old sources are removed, so that files deleted by a commit are not imported.
install="{ [ ! -x jaxdiff/tpu_scripts/worker.sh ] || jaxdiff/tpu_scripts/worker.sh idle; }"
install+=" && mkdir -p jaxdiff && cd jaxdiff && rm -rf jaxdiff experiments tests tpu_scripts"
install+=" && tar -xzf ../jaxdiff.tar.gz"
if [[ -n ${TPU_SETUP:-} ]]; then install+=" && { $TPU_SETUP; }"; fi
if [[ -n $TPU_BUCKET ]]; then install+=" && tpu_scripts/worker.sh mount $TPU_BUCKET"; fi
# Newer images reject pip outside an environment without this variable; older pips ignore it.
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
