# shellcheck shell=bash disable=SC2034
# Shared by the scripts of this folder: settings, options, running commands, the pod's state. Sourced, not run.

HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd -- "$HERE/.." && pwd)
REQUIRED="TPU_NAME TPU_ZONE TPU_TYPE TPU_VERSION"
ENV_FILE=${TPU_ENV:-$HERE/tpu.env}
DRY_RUN=false
YES=false
DETACH=false
ATTACH=false
STOP=false
NO_WAIT=false
CHECKPOINTS=false
DELETE=false
LOGS=false
ID=
INTO=
REST=()
WORDS=()
PASSED=()
exec 3>&1 # for printing commands, also while the output of a command is captured

fail() {
  printf 'error: %s\n' "$1" >&2
  exit "${2:-2}"
}

# The comment at the top of the script.
help() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

# parse "--flags --with-value= of this script" "$@": --no-wait sets NO_WAIT, --into X sets INTO. Words after a bare --
# go to REST; with WORDS among the options, other arguments go there too.
parse() {
  local known=" --help --dry-run --env= $1 " name
  shift
  while (($#)); do
    name=$(printf '%s' "${1#--}" | tr 'a-z-' 'A-Z_')
    if [[ $1 == -- ]]; then
      shift
      REST+=("$@")
      break
    elif [[ $1 == --help ]]; then
      help
      exit 0
    elif [[ $1 =~ ^--[a-z-]+$ && $known == *" $1 "* ]]; then
      printf -v "$name" true
    elif [[ $1 =~ ^--[a-z-]+$ && $known == *" $1= "* ]]; then
      (($# > 1)) || fail "$1 needs a value"
      [[ $name != ENV ]] || name=ENV_FILE
      printf -v "$name" '%s' "$2"
      shift
    elif [[ $known == *" WORDS "* && $1 != -* ]]; then
      REST+=("$1")
    else
      fail "unknown argument '$1'; --help lists them"
    fi
    shift
  done
  read_settings
}

# Read and check the env file. Sets its variables; PLACE: the flags of every gcloud command; NODES: the names of the
# slices; PASSED: the names in TPU_PASS.
read_settings() {
  local slice wrong=()
  [[ -f $ENV_FILE ]] || fail "no settings at $ENV_FILE: copy tpu.env.example there and fill it in"
  check_file
  # shellcheck source=tpu.env.example
  source "$ENV_FILE"
  check_settings
  if ((${#wrong[@]})); then
    printf 'error: %s\n' "${wrong[@]}" >&2
    exit 2
  fi
  TPU_SLICES=${TPU_SLICES:-1} TPU_BUCKET=${TPU_BUCKET:-} TPU_POLL_SECONDS=${TPU_POLL_SECONDS:-15}
  PLACE=("--zone=${TPU_ZONE:-}")
  if [[ -n ${TPU_PROJECT:-} ]]; then PLACE+=("--project=$TPU_PROJECT"); fi
  NODES=()
  if ((TPU_SLICES == 1)); then NODES=("$TPU_NAME"); fi
  for ((slice = 0; slice < TPU_SLICES && TPU_SLICES > 1; slice++)); do NODES+=("$TPU_NAME-$slice"); done
  LOGS_AT=${TPU_LOGS:-$ROOT/runs/tpu}/$TPU_NAME
}

# Fails for errors of bash in the env file, such as spaces around =. In a subshell, as an error would end this one; in
# English, as the output is searched for "line".
check_file() {
  local line said end=$'\3'
  # shellcheck source=/dev/null
  said=$(
    set +e
    export LC_ALL=C
    source "$ENV_FILE" 2>&1 >/dev/null
    printf '\n%s' "$end"
  ) || true
  while IFS= read -r line; do
    if [[ $line == "$ENV_FILE: line "*": "* ]]; then fail "$line"; fi
  done <<<"$said"
  [[ $said == *"$end" ]] || fail "$ENV_FILE: ends the shell that reads it: settings alone, no exit or exec"
}

# form NAME PATTERN WORDS: the required form of a non-empty setting. Adds errors to `wrong` and the name to `known`.
form() {
  known+=" $1 "
  local value=${!1:-}
  [[ -z $value || $value =~ ^($2)$ ]] || wrong+=("$1 '${value//[[:cntrl:]]/?}': $3")
}

# Adds all errors in the settings to `wrong`.
check_settings() {
  local name line known='' whole='0|[1-9][0-9]{0,8}' number='[0-9]{1,9}(\.[0-9]*)?' label='[a-z0-9]([-a-z0-9]*[a-z0-9])?'
  for name in $REQUIRED; do
    [[ -n ${!name:-} ]] || wrong+=("$ENV_FILE does not set $name")
  done
  form TPU_NAME '[a-z]([-a-z0-9]{0,61}[a-z0-9])?' "lower-case letters, digits and dashes only"
  form TPU_ZONE '[a-z]+(-[a-z]+)+[0-9]+-(ai[0-9]+)?[a-z]' "a zone such as us-west4-a"
  form TPU_PROJECT '[a-z][-a-z0-9.:]*' "a project's ID"
  form TPU_TYPE '[a-z0-9]+-[1-9][0-9]{0,5}' "a kind and a size, such as v5litepod-16"
  form TPU_VERSION '[a-z0-9][-a-z0-9.]*' "a runtime version such as v2-alpha-tpuv6e"
  form TPU_SLICES '[1-9][0-9]{0,2}' "a whole number, 1 to 999"
  form TPU_SPOT 'true|false' "true or false"
  form TPU_RESERVED 'true|false' "true or false"
  form TPU_VALID_UNTIL '([0-9]+[smhdw])+' "a duration such as 6h or 2d"
  form TPU_CREATE_FLAGS $'--[^\001\002]*' "flags of gcloud, the first of which begins with --"
  form TPU_POLL_SECONDS "0*[1-9][0-9]{0,5}(\.[0-9]*)?|0+\.[0-9]*[1-9][0-9]*" "a number of seconds above 0"
  form TPU_PYTHON '3\.(1[1-9]|[2-9][0-9])(\.[0-9]+)?' "3.11 or newer"
  form TPU_BUCKET '[-a-z0-9_.]+' "the bucket's name alone, without gs://"
  form TPU_SETUP '(.|[[:space:]])*' "a line of shell"
  form TPU_PASS '(.|[[:space:]])*' "names of variables"
  form TPU_LOGS '(.|[[:space:]])*' "a folder"
  for name in TPU_MAX_RESTARTS TPU_STOP_SECONDS TPU_BACKOFF_SECONDS TPU_BACKOFF_MOST GKE_GRACE_SECONDS; do
    form "$name" "$whole" "a whole number"
  done
  for name in TPU_MAX_HOURS TPU_MAX_DOLLARS TPU_DOLLARS_PER_HOUR; do form "$name" "$number" "a number"; done
  form GKE_IMAGE '[-a-zA-Z0-9_./:@]+' "an image's name"
  form GKE_ACCELERATOR "$label" "a kind such as tpu-v6e-slice"
  form GKE_TOPOLOGY '[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2}' "4x4 or 2x2x4"
  form GKE_CHIPS '[1-9][0-9]{0,2}' "a whole number, 1 or more"
  form GKE_SERVICE_ACCOUNT '[a-z0-9]([-a-z0-9.]*[a-z0-9])?' "a Kubernetes name"
  form GKE_NAMESPACE "$label" "a Kubernetes name"
  [[ ${TPU_SPOT:-} != true || ${TPU_RESERVED:-} != true ]] || wrong+=("TPU_SPOT and TPU_RESERVED are both true: one of them")
  [[ -z ${TPU_MAX_DOLLARS:-} || ${TPU_DOLLARS_PER_HOUR:-0} =~ [1-9] ]] || wrong+=("TPU_MAX_DOLLARS needs TPU_DOLLARS_PER_HOUR")
  words_of "${TPU_CREATE_FLAGS:-}" || wrong+=("TPU_CREATE_FLAGS: a quote that is not closed")
  words_of "${TPU_PASS:-}" || wrong+=("TPU_PASS: a quote that is not closed")
  PASSED=(${WORDS[@]+"${WORDS[@]}"})
  for name in ${PASSED[@]+"${PASSED[@]}"}; do
    [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || wrong+=("TPU_PASS: '$name' is not the name of a variable")
  done
  while IFS= read -r line || [[ -n $line ]]; do
    [[ $line =~ ^[[:space:]]*(export[[:space:]]+)?((TPU|GKE)_[A-Za-z0-9_]*)\+?= ]] || continue
    name=${BASH_REMATCH[2]}
    [[ "$known ${PASSED[*]-} " == *" $name "* ]] || wrong+=("$name: there is no such setting; tpu.env.example has all")
  done <"$ENV_FILE"
}

# The variables named by TPU_PASS must have values.
check_passed() {
  local name
  for name in ${PASSED[@]+"${PASSED[@]}"}; do
    [[ -n ${!name:-} ]] || fail "TPU_PASS names $name, which has no value here"
  done
}

# needs PROGRAM...: must be installed, unless this is a dry run.
needs() {
  local program
  for program; do
    [[ $DRY_RUN == true ]] || command -v "$program" >/dev/null || fail "$program is not installed (or not on PATH)"
  done
}

# Split a line into WORDS with a shell's quotes and backslashes, without expansion. Fails for an unclosed quote.
words_of() {
  local text=$1 mark='' word='' any=false place letter
  WORDS=()
  for ((place = 0; place < ${#text}; place++)); do
    letter=${text:place:1}
    if [[ $letter == "\\" && $mark != "'" ]]; then
      place=$((place + 1)) any=true
      [[ -z $mark || ${text:place:1} == ['"\$`'] ]] || word+="\\"
      word+=${text:place:1}
    elif [[ $letter == "$mark" ]]; then
      mark=''
    elif [[ -z $mark && $letter == ["\"'"] ]]; then
      mark=$letter any=true
    elif [[ -z $mark && $letter == [[:space:]] ]]; then
      if [[ $any == true ]]; then WORDS+=("$word"); fi
      word='' any=false
    else
      word+=$letter any=true
    fi
  done
  if [[ $any == true ]]; then WORDS+=("$word"); fi
  [[ -z $mark ]]
}

# Quote a word for the shell, if needed.
quoted() {
  local quote="'\\''"
  if [[ $1 =~ ^[[:alnum:]_./:=@%+,-]+$ ]]; then
    printf '%s' "$1"
  else
    printf "'%s'" "${1//\'/$quote}"
  fi
}

# All words in one line.
line_of() {
  local word line=
  for word; do line+=" $(quoted "$word")"; done
  printf '%s' "${line# }"
}

show() {
  printf '+ %s\n' "$(line_of "$@")" >&3
}

# Print a command; run it unless this is a dry run.
call() {
  show "$@"
  run_it "$@"
}

run_it() {
  if [[ $DRY_RUN == false ]]; then
    needs "$1"
    "$@" 3>&-
  fi
}

# Placeholders for a slice's name and number in the words of on_nodes; they do not occur in user commands.
NODE=$'\1'
SLICE=$'\2'

# Run a command for all slices in parallel. Fails if it fails for any of them.
on_nodes() {
  local index word pids=() words pid code=0
  for ((index = 0; index < TPU_SLICES; index++)); do
    words=()
    for word; do
      word=${word//$NODE/${NODES[index]}}
      words+=("${word//$SLICE/$index}")
    done
    show "${words[@]}"
    set -m # separate process groups, so that ending this script also ends ssh
    run_it "${words[@]}" </dev/null &
    set +m
    pids+=("-$!")
    # shellcheck disable=SC2064  # the pids of now
    trap "kill -- ${pids[*]} 2>/dev/null; exit 143" INT TERM
  done
  for pid in "${pids[@]}"; do wait "${pid#-}" || code=$?; done
  trap - INT TERM
  return "$code"
}

# Run a line of shell on all workers in parallel. A dead connection is detected within 90 seconds.
on_workers() {
  on_nodes gcloud compute tpus tpu-vm ssh "$NODE" "${PLACE[@]}" --worker=all "--ssh-flag=-o ServerAliveInterval=30" \
    "--command=export SLICE=$SLICE && $1"
}

# Copy a file to every worker.
to_workers() {
  on_nodes gcloud compute tpus tpu-vm scp "$1" "$NODE:$2" "${PLACE[@]}" --worker=all
}

# The existing machines of the pod: one line with name and state each.
node_states() {
  local all node
  all=$(run_it gcloud compute tpus tpu-vm list "${PLACE[@]}" "--format=value(name.basename(),state)") || return
  for node in "${NODES[@]}"; do printf '%s\n' "$all" | awk -v node="$node" '$1 == node'; done
}

# pod_state [shown]: ABSENT, or the queued resource's state, refined from ACTIVE to STARTING or PREEMPTED by the states
# of its nodes. Uses `list`, whose empty result is not an error, so every failure is a real one.
pod_state() {
  local state nodes ready all filter="/queuedResources/$TPU_NAME\$"
  local request=(gcloud compute tpus queued-resources list "${PLACE[@]}" "--filter=name~\"$filter\"")
  request+=("--format=value(state.state)")
  if [[ ${1:-} == shown ]]; then show "${request[@]}"; fi
  state=$(run_it "${request[@]}") || return
  if [[ $state == ACTIVE ]]; then
    all=$(node_states) || return
    nodes=$(printf '%s\n' "$all" | awk '{print $2}')
    ready=$(printf '%s\n' "$nodes" | grep -c '^READY$' || true)
    if ((ready < TPU_SLICES)); then
      state=PREEMPTED
      if grep -qE '^(CREATING|STARTING|RESTARTING|REPAIRING|REIMAGING)$' <<<"$nodes"; then state=STARTING; fi
      if grep -qE '^(PREEMPTED|TERMINATED|STOPPED|DELETING)$' <<<"$nodes"; then state=PREEMPTED; fi
    fi
  fi
  printf '%s' "${state:-ABSENT}"
}

# The number of devices that JAX should see in the pod; empty for an unknown kind.
devices() {
  local number=${TPU_TYPE##*-}
  case $TPU_TYPE in
    v4-* | v5p-*) number=$((number / 2)) ;; # the name counts cores, JAX sees chips
    v2-* | v3-* | v5litepod-* | v6e-*) ;;
    *) return 0 ;;
  esac
  printf '%s' $((number * TPU_SLICES))
}
