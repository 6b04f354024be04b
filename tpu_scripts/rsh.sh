#!/usr/bin/env bash
# What rsync takes for ssh: rsh.sh NODE COMMAND..., on the first worker. fetch.sh uses it; nothing to type.

set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
read_settings
needs gcloud
node=$1
shift
exec gcloud compute tpus tpu-vm ssh "$node" "${PLACE[@]}" --worker=0 "--command=$*"
