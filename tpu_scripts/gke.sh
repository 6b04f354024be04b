#!/usr/bin/env bash
# Run a command on TPU slices of a Google Kubernetes Engine cluster, as the JobSet of gke_jobset.yaml.
#
#   tpu_scripts/gke.sh [--dry-run] [--env FILE] -- COMMAND [ARGUMENT...]
#   tpu_scripts/gke.sh --logs | --delete [--yes] [--dry-run] [--env FILE]
#
#   --dry-run   print the manifest and the exact commands and run none
#   --logs      follow the output of each slice's first machine
#   --delete    end the run: SIGTERM, time to save, then delete the JobSet; asks for its name first
#   --yes       do not ask
#   --env FILE  settings to read instead of tpu_scripts/tpu.env (or $TPU_ENV); see tpu.env.example
#
# The cluster restarts it after a save (75), when nodes are preempted or pods have lost each other (71), at most
# TPU_MAX_RESTARTS times. Node pools, JobSet and the image must exist: see README.md.

# shellcheck disable=SC2034  # the manifest's values are read by name
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
REQUIRED="TPU_NAME"

parse "--logs --delete --yes" "$@"
needs kubectl
kubectl=(kubectl "--namespace=${GKE_NAMESPACE:-default}")

# The words as a JSON list, which is valid YAML. Kubernetes would expand $(NAME), so $ is doubled before a bracket.
json() {
  local word list='' code mark
  for word; do
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    word=${word//$'\n'/\\n}
    word=${word//$'\t'/\\t}
    if [[ $word == *[[:cntrl:]]* ]]; then
      for ((code = 1; code < 32; code++)); do
        printf -v mark '%b' "\\x$(printf '%x' "$code")"
        word=${word//"$mark"/"$(printf '\\u%04x' "$code")"}
      done
    fi
    word=${word//\$(/\$\$(}
    list+=", \"$word\""
  done
  printf '[%s]' "${list#, }"
}

manifest() {
  local text name chips=1 size MACHINES COMMAND SPOT_SELECTOR=''
  for name in GKE_IMAGE GKE_ACCELERATOR GKE_TOPOLOGY; do
    [[ -n ${!name:-} ]] || fail "$ENV_FILE does not set $name"
  done
  [[ -n $TPU_BUCKET ]] || fail "TPU_BUCKET is not set: pods keep nothing on their own disks"
  TPU_MAX_RESTARTS=${TPU_MAX_RESTARTS:-100}
  GKE_CHIPS=${GKE_CHIPS:-4} GKE_GRACE_SECONDS=${GKE_GRACE_SECONDS:-300}
  GKE_SERVICE_ACCOUNT=${GKE_SERVICE_ACCOUNT:-default}
  for size in ${GKE_TOPOLOGY//x/ }; do chips=$((chips * size)); done
  ((chips % GKE_CHIPS == 0)) || fail "GKE_CHIPS: $chips chips are not whole machines of $GKE_CHIPS"
  MACHINES=$((chips / GKE_CHIPS))
  COMMAND=$(json "${REST[@]}")
  if [[ ${TPU_SPOT:-} == true ]]; then SPOT_SELECTOR='cloud.google.com/gke-spot: "true"'; fi
  text=$(cat "$HERE/gke_jobset.yaml")
  for name in TPU_NAME TPU_SLICES TPU_BUCKET TPU_MAX_RESTARTS GKE_IMAGE GKE_ACCELERATOR GKE_TOPOLOGY GKE_CHIPS \
    GKE_GRACE_SECONDS GKE_SERVICE_ACCOUNT MACHINES SPOT_SELECTOR COMMAND; do
    text=${text//"\${$name}"/"${!name}"}
  done
  printf '%s\n' "$text"
}

# The variables named by TPU_PASS become a secret of the cluster, through a file that only its owner can read.
secret() {
  local name
  ((${#PASSED[@]})) || return 0
  for name in "${PASSED[@]}"; do
    [[ ${!name} != *$'\n'* ]] || fail "TPU_PASS names $name, which has several lines"
    printf '# variables: %s=***\n' "$name"
    (umask 077 && printf '%s=%s\n' "$name" "${!name}" >>"$folder/variables")
  done
  call "${kubectl[@]}" delete secret "$TPU_NAME-env" --ignore-not-found
  call "${kubectl[@]}" create secret generic "$TPU_NAME-env" "--from-env-file=$folder/variables"
}

if [[ $LOGS == true ]]; then
  [[ $DELETE == false && ${#REST[@]} == 0 ]] || fail "--logs, --delete or a command: one of them"
  selector="jobset.sigs.k8s.io/jobset-name=$TPU_NAME,batch.kubernetes.io/job-completion-index=0"
  call "${kubectl[@]}" logs "--selector=$selector" --prefix --tail=100 --follow \
    "--max-log-requests=$TPU_SLICES"
elif [[ $DELETE == true ]]; then
  ((${#REST[@]} == 0)) || fail "--logs, --delete or a command: one of them"
  if [[ $YES == false && $DRY_RUN == false ]]; then
    printf 'End %s? Type its name: ' "$TPU_NAME" >&2
    read -r answer || true
    [[ ${answer:-} == "$TPU_NAME" ]] || fail "not deleted"
  fi
  call "${kubectl[@]}" delete jobset "$TPU_NAME" --ignore-not-found
  if [[ -n ${TPU_PASS:-} ]]; then call "${kubectl[@]}" delete secret "$TPU_NAME-env" --ignore-not-found; fi
else
  ((${#REST[@]})) || fail "no command: put it behind --"
  check_passed
  text=$(manifest)
  folder=$(mktemp -d)
  trap 'rm -rf -- "$folder"' EXIT
  if [[ $DRY_RUN == true ]]; then printf '%s\n' "$text"; fi
  there=$(call "${kubectl[@]}" get jobset "$TPU_NAME" --ignore-not-found --output=name)
  [[ -z $there ]] || fail "$TPU_NAME is there already: gke.sh --logs shows it, gke.sh --delete ends it"
  secret
  printf '%s\n' "$text" | call "${kubectl[@]}" create --filename=-
fi
