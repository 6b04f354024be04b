#!/usr/bin/env bash
# Put the committed state of this repository on every worker of the TPU and install it there. Run it again to update.
#
#   tpu_scripts/setup.sh [--dry-run] [--env FILE]
#
#   --dry-run   print the exact commands and run none
#   --env FILE  settings to read instead of tpu_scripts/tpu.env (or $TPU_ENV); see tpu.env.example
#
# The images come with Python 3.10; uv installs the one of TPU_PYTHON beside it. Ends with the number of chips that
# each worker sees.

set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

parse "" "$@"
root=$(cd -- "$HERE/.." && pwd)
if [[ -n $(git -C "$root" status --porcelain) ]]; then
  printf 'warning: changes that are not committed stay here\n' >&2
fi
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
archive=$folder/jaxdiff.tar.gz
call git -C "$root" archive --format=tar.gz "--output=$archive" HEAD
call gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:jaxdiff.tar.gz" "${PLACE[@]}" --worker=all
python=${TPU_PYTHON:-3.12}
install="mkdir -p jaxdiff && tar -xzf jaxdiff.tar.gz -C jaxdiff && cd jaxdiff"
install+=" && python3 -m pip install --quiet --user uv"
install+=" && ~/.local/bin/uv venv --quiet --allow-existing --python $(quoted "$python") .venv"
install+=" && ~/.local/bin/uv pip install --quiet --python .venv/bin/python -e '.[tpu,bucket]'"
on_workers "$install"
on_workers "cd jaxdiff && .venv/bin/python -c 'import jax; print(jax.local_device_count(), jax.devices()[0].device_kind)'"
