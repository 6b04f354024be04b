#!/usr/bin/env bash
# Run a command on every worker of the TPU, in the repository, with its Python first on PATH.
#
#   tpu_scripts/run.sh [--dry-run] [--detach] [--env FILE] -- COMMAND [ARGUMENT...]
#   tpu_scripts/run.sh -- python -m experiments.imagen.train --stage base64 --preset 300m --text google/flan-t5-xxl --text-dtype bfloat16 --dtype bfloat16 --out runs/base64
#
#   --dry-run   print the exact commands and run none
#   --detach    leave it running and return; its output goes to runs/tpu.log on each worker
#   --env FILE  settings to read instead of tpu_scripts/tpu.env (or $TPU_ENV); see tpu.env.example
#
# Training that was interrupted goes on when the same command is run again.

set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

parse "--detach" "$@"
((${#REST[@]})) || fail "no command: put it behind --"
command=
for word in "${REST[@]}"; do command+=" $(quoted "$word")"; done
# shellcheck disable=SC2016  # $PWD and $PATH are the worker's
path='PATH=$PWD/.venv/bin:$PATH'
if [[ $DETACH == true ]]; then
  on_workers "cd jaxdiff && mkdir -p runs && { $path nohup setsid$command > runs/tpu.log 2>&1 < /dev/null & }"
else
  on_workers "cd jaxdiff && $path$command"
fi
