# Sourced by every script in this folder: parses flags, reads the env file, and defines `run`, which prints a command
# and, without --dry-run, executes it.
# shellcheck shell=bash

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ENV_FILE="$HERE/env.sh"
DRY_RUN=0

die() {
  echo "error: $*" >&2
  exit 2
}

# Prints the comment at the top of the calling script as its help.
usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
}

# Parses --help, --dry-run and --env=FILE; the remaining flags are stored in REST.
parse_flags() {
  REST=()
  local flag
  for flag in "$@"; do
    case $flag in
      --help | -h) usage && exit 0 ;;
      --dry-run) DRY_RUN=1 ;;
      --env=*) ENV_FILE=${flag#--env=} ;;
      *) REST+=("$flag") ;;
    esac
  done
}

no_more_flags() {
  [[ ${#REST[@]} -eq 0 ]] || die "unknown flag ${REST[0]}: see $0 --help"
}

read_env() {
  [[ -f $ENV_FILE ]] || die "$ENV_FILE does not exist: cp tpu/env.example tpu/env.sh and edit it, or give --env=FILE"
  ! grep -q $'\r' "$ENV_FILE" || die "$ENV_FILE has the line ends of Windows: remove them with sed -i 's/\r\$//' $ENV_FILE"
  # shellcheck source=env.example
  source "$ENV_FILE"
  [[ ${SPOT:-0} == [01] ]] || die "$ENV_FILE sets SPOT=$SPOT: use 1 (spot) or 0 (on demand)"
  local setting
  for setting in PROJECT ZONE NAME ACCELERATOR_TYPE RUNTIME_VERSION BUCKET CONFIG WORKDIR; do
    [[ -n ${!setting:-} ]] || die "$ENV_FILE does not set $setting: add it, see tpu/env.example"
  done
  HOME_IN_BUCKET="gs://$BUCKET/diva_jax/$NAME"
  WHERE=("--project=$PROJECT" "--zone=$ZONE")
}

run() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  [[ $DRY_RUN -eq 1 ]] || "$@"
}

# Runs command $2 on worker $1 of the slice, or on every worker for "all".
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" "--worker=$1" "--command=$2"
}

# Uploads the code of the current commit and the env file to the bucket, from which the machines download them.
upload() {
  local archive="$HERE/../build/diva_jax.tar.gz"
  run mkdir -p "$HERE/../build"
  run git -C "$HERE/.." archive --format=tar.gz --prefix=diva_jax/ --output="$archive" HEAD
  run gcloud storage cp "$archive" "$HOME_IN_BUCKET/diva_jax.tar.gz"
  run gcloud storage cp "$ENV_FILE" "$HOME_IN_BUCKET/env.sh"
}
