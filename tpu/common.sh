# Sourced by every script in this folder: parses flags, reads the env file, and defines `run`, which prints a command
# and, without --dry-run, executes it.
# shellcheck shell=bash disable=SC2034 # Variables are for those scripts.

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) # tpu/
ENV_FILE="$HERE/env.sh"
DRY_RUN=0
NEEDS=()

die() {
  echo "error: $*" >&2
  exit 2
}

# In older ones, an empty list is an unset variable.
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) ||
  die "this is bash $BASH_VERSION: install 4.4 or newer, e.g. with brew install bash, and start the script with it"

# Prints the comment at the top of the calling script as its help.
usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
}

# Parses --help, --dry-run and --env=FILE; the remaining flags are stored in REST, those after -- in PASSED.
parse_flags() {
  REST=() PASSED=()
  local flag
  while [[ $# -gt 0 ]]; do
    flag=$1
    shift
    case $flag in
      --) PASSED=("$@") && break ;;
      --help | -h) usage && exit 0 ;;
      --dry-run) DRY_RUN=1 ;;
      --env=*) ENV_FILE=${flag#--env=} ;;
      *) REST+=("$flag") ;;
    esac
  done
}

no_more_flags() {
  local unknown=("${REST[@]}" "${PASSED[@]}")
  [[ ${#unknown[@]} -eq 0 ]] || die "unknown flag ${unknown[0]}: see $0 --help"
}

# Reads the env file, which must set what all scripts need and the names in NEEDS.
read_env() {
  [[ -f $ENV_FILE ]] || die "$ENV_FILE does not exist: cp tpu/env.example tpu/env.sh and edit it, or give --env=FILE"
  ! grep -q $'\r' "$ENV_FILE" || die "$ENV_FILE has the line ends of Windows: remove them with sed -i 's/\r\$//' $ENV_FILE"
  # shellcheck source=env.example
  source "$ENV_FILE"
  case ${SPOT:-0} in
    0) CAPACITY=on-demand ;;
    1) CAPACITY=spot ;;
    flex-start) CAPACITY=flex-start ;;
    *) die "$ENV_FILE sets SPOT=$SPOT: use 1 (spot), 0 (on demand) or flex-start" ;;
  esac
  [[ ${SELFCHECK:-1} == [01] ]] || die "$ENV_FILE sets SELFCHECK=$SELFCHECK: use 1 (before training) or 0 (never)"
  local setting
  for setting in PROJECT ZONE NAME BUCKET CONFIG WORKDIR "${NEEDS[@]}"; do
    [[ -n ${!setting:-} ]] || die "$ENV_FILE does not set $setting: add it, see tpu/env.example"
  done
  refuse_placeholders
  HOME_IN_BUCKET="gs://$BUCKET/diva_jax/$NAME"
  WHERE=("--project=$PROJECT" "--zone=$ZONE")
}

# Ends with an error if a setting still has the value of env.example that names nobody's project or bucket.
refuse_placeholders() {
  local setting value
  for setting in PROJECT BUCKET WORKDIR FLAGS; do
    value=${!setting:-}
    case $value in
      *my-project* | *my-bucket*) die "$ENV_FILE has $setting=$value from env.example: set it to your own" ;;
    esac
  done
}

# Sets what Google calls the chips and machines of TOPOLOGY, e.g. v5e:4x4; a machine has four chips.
read_topology() {
  CHIP=${TOPOLOGY%%:*} SHAPE=${TOPOLOGY#*:}
  IMAGE_FAMILY=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e
  case $CHIP in
    v4) MACHINE_TYPE=ct4p-hightpu-4t GKE_ACCELERATOR=tpu-v4-podslice ;;
    v5e) MACHINE_TYPE=ct5lp-hightpu-4t GKE_ACCELERATOR=tpu-v5-lite-podslice ;;
    v5p) MACHINE_TYPE=ct5p-hightpu-4t GKE_ACCELERATOR=tpu-v5p-slice ;;
    v6e) MACHINE_TYPE=ct6e-standard-4t GKE_ACCELERATOR=tpu-v6e-slice ;;
    tpu7x) MACHINE_TYPE=tpu7x-standard-4t GKE_ACCELERATOR=tpu7x IMAGE_FAMILY=ubuntu-accel-2404-amd64-tpu-tpu7x ;;
    *) die "$ENV_FILE sets TOPOLOGY=$TOPOLOGY: use v4, v5e, v5p, v6e or tpu7x, e.g. v5e:4x4 or tpu7x:2x2x2" ;;
  esac
  local axes=2
  [[ $CHIP == v[56]e ]] || axes=3
  [[ $SHAPE =~ ^[0-9]+(x[0-9]+){$((axes - 1))}$ ]] || die "$ENV_FILE sets TOPOLOGY=$TOPOLOGY: a $CHIP has $axes axes"
  CHIPS=$((${SHAPE//x/*}))
  [[ $((CHIPS % 4)) -eq 0 && $CHIPS -gt 0 ]] || die "$ENV_FILE sets TOPOLOGY=$TOPOLOGY: use a multiple of four chips"
  MACHINES=$((CHIPS / 4)) REGION=${ZONE%-*}
}

# Makes the policy by which the machines of a slice are placed together and linked, unless there is one from before,
# which may be that of another shape.
create_policy() {
  local policy=(gcloud compute resource-policies) place=("--project=$PROJECT" "--region=$REGION") shape
  run "${policy[@]}" create workload-policy "$NAME" "${place[@]}" --type=HIGH_THROUGHPUT \
    "--accelerator-topology=$SHAPE" && return
  shape=$("${policy[@]}" describe "$NAME" "${place[@]}" '--format=value(workloadPolicy.acceleratorTopology)')
  [[ $shape == "$SHAPE" ]] || die "the policy $NAME is for a slice of $shape and not of $SHAPE: use another NAME, or" \
    "delete what uses it, and then the policy with ${policy[*]} delete $NAME ${place[*]}"
}

run() {
  printf '+%s\n' "$(printf ' %q' "$@")"
  [[ $DRY_RUN -eq 1 ]] || "$@"
}

# Runs command $2 on worker $1 of the slice, or on every worker for "all".
on_workers() {
  if [[ -n ${MIG:-} ]]; then
    on_instances "$@"
    return
  fi
  run gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" "--worker=$1" "--command=$2"
}

# The same in a managed instance group, where a worker is the number of an instance in the group's list: on the first,
# which may ask for a key, and then on the others at once, since a run that ends on one machine starts again on those in
# half a minute. The status is that of a command that failed, or 1 where there is no such machine.
on_instances() {
  local list=(gcloud compute instance-groups managed list-instances "$NAME" "${WHERE[@]}" '--format=value(name)')
  local names=() found i pids=() status=0 reached=0
  if [[ $DRY_RUN -eq 1 ]]; then
    run "${list[@]}"
    names=(INSTANCE)
  else
    found=$("${list[@]}") || return
    [[ -z $found ]] || mapfile -t names <<<"$found"
  fi
  for i in "${!names[@]}"; do
    [[ $1 != all && $1 != "$i" && $DRY_RUN -eq 0 ]] && continue
    reached=1
    if [[ $1 == all && $i -gt 0 ]]; then
      run gcloud compute ssh "${names[i]}" "${WHERE[@]}" "--command=$2" </dev/null &
      pids+=($!)
    else
      run gcloud compute ssh "${names[i]}" "${WHERE[@]}" "--command=$2" || status=$?
    fi
  done
  for i in "${pids[@]}"; do
    wait "$i" || status=$?
  done
  [[ $reached -eq 1 ]] || echo "error: no machine for --worker=$1, since the group $NAME has ${#names[@]} machines" >&2
  return "$((status + 1 - reached))"
}

# Says which changes are not part of the current commit, and so not of what is uploaded.
report_changes() {
  local changed
  changed=$(git -C "$HERE/.." status --porcelain -- . ':!tpu/env.sh' | sed -n 1,5p)
  [[ -z $changed ]] || echo "note: these changes are not committed and are not uploaded:"$'\n'"$changed" >&2
}

# Uploads the code of the current commit and the env file to the bucket, from which the machines download them.
upload() {
  local archive="$HERE/../build/diva_jax.tar.gz"
  report_changes
  run mkdir -p "$HERE/../build"
  run git -C "$HERE/.." archive --format=tar.gz --prefix=diva_jax/ --output="$archive" HEAD
  run gcloud storage cp "$archive" "$HOME_IN_BUCKET/diva_jax.tar.gz"
  run gcloud storage cp "$ENV_FILE" "$HOME_IN_BUCKET/env.sh"
}

# What tpu/setup.sh, launch.sh, logs.sh, status.sh and delete.sh do on the machines of a slice.
install_code() {
  upload
  on_workers all "sudo /opt/diva_jax/vm.sh setup"
}

restart() {
  run gcloud storage cp "$ENV_FILE" "$HOME_IN_BUCKET/env.sh"
  on_workers all "sudo /opt/diva_jax/vm.sh stop"
  on_workers all "sudo /opt/diva_jax/vm.sh start"
}

# Takes --worker=N and --lines=N.
follow() {
  local worker=0 back=100 flag
  for flag in "$@"; do
    case $flag in
      --worker=*) worker=${flag#--worker=} ;;
      --lines=*) back=${flag#--lines=} ;;
      *) die "unknown flag $flag: see $0 --help" ;;
    esac
  done
  [[ $worker != all || -z ${MIG:-} ]] || die "--worker=all is not for instance groups: give the number of a machine"
  on_workers "$worker" "sudo journalctl --unit=google-startup-scripts --unit=diva_jax --lines=$back --follow --output=cat"
}

last_lines() {
  on_workers all "hostname; systemctl is-active diva_jax; sudo journalctl --unit=google-startup-scripts --unit=diva_jax --lines=1 --output=cat"
}

# There is no run to stop if the slice does not exist.
stop() {
  on_workers all "sudo /opt/diva_jax/vm.sh stop" || echo "note: not every machine was stopped, see above" >&2
}
