#!/usr/bin/env bash
# Remote shell for rsync, used by fetch.sh: rsh.sh NODE COMMAND... runs on the first worker.

set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
read_settings
needs gcloud
node=$1
shift
exec gcloud compute tpus tpu-vm ssh "$node" "${PLACE[@]}" --worker=0 "--command=$*"
