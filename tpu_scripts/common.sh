# shellcheck shell=bash disable=SC2034
# What the scripts of this folder share: settings, options, and one way to run a command. Sourced, not run.

HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
ENV_FILE=${TPU_ENV:-$HERE/tpu.env}
DRY_RUN=false
YES=false
DETACH=false
REST=()

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# The comment at the top of the script.
help() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

# parse "options that this script has" "$@": sets the variables above; what follows a bare -- goes to REST.
parse() {
  local known=" --help --dry-run --env $1 "
  shift
  while (($#)); do
    [[ $1 == -- || $known == *" $1 "* ]] || fail "unknown argument '$1'; --help lists them"
    case $1 in
      --help)
        help
        exit 0
        ;;
      --dry-run) DRY_RUN=true ;;
      --yes) YES=true ;;
      --detach) DETACH=true ;;
      --env)
        (($# > 1)) || fail "--env needs a file"
        ENV_FILE=$2
        shift
        ;;
      --)
        shift
        REST=("$@")
        break
        ;;
    esac
    shift
  done
  read_settings
}

# The env file into TPU_* variables, and PLACE: the flags that every gcloud command needs.
read_settings() {
  [[ -f $ENV_FILE ]] || fail "no settings at $ENV_FILE: copy tpu.env.example there and fill it in"
  # shellcheck source=tpu.env.example
  source "$ENV_FILE"
  local name
  for name in TPU_NAME TPU_ZONE TPU_TYPE TPU_VERSION; do
    [[ -n ${!name:-} ]] || fail "$ENV_FILE does not set $name"
  done
  [[ $TPU_NAME =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
    fail "TPU_NAME '$TPU_NAME': lower-case letters, digits and dashes only"
  PLACE=("--zone=$TPU_ZONE")
  if [[ -n ${TPU_PROJECT:-} ]]; then PLACE+=("--project=$TPU_PROJECT"); fi
}

# A word as the shell reads it back, in quotes only where it needs them.
quoted() {
  if [[ $1 =~ ^[[:alnum:]_./:=@%+,-]+$ ]]; then
    printf '%s' "$1"
  else
    printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")"
  fi
}

# Print a command as it could be typed; unless this is a dry run, run it too.
call() {
  local word line='+'
  for word; do line+=" $(quoted "$word")"; done
  printf '%s\n' "$line"
  if [[ $DRY_RUN == false ]]; then
    command -v "$1" >/dev/null || fail "$1 is not installed (or not on PATH)"
    "$@"
  fi
}

# Run a line of shell on every worker of the TPU at the same time.
on_workers() {
  call gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${PLACE[@]}" --worker=all "--command=$1"
}
