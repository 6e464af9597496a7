#!/usr/bin/env bash
# Requests a TPU slice that installs diva_jax and starts training as soon as it is available.
#
#   tpu/create.sh [--watch] [--env=FILE] [--dry-run] [--help]
#
# The script uploads the code of the current commit and the env file to the bucket, then creates a queued resource. The
# machines of the slice run tpu/vm.sh at every start, so a restarted machine resumes training. A preempted spot slice is
# deleted; with --watch, this command keeps running and requests a new slice each time until the run is finished.
set -euo pipefail
source "$(dirname "$0")/common.sh"

parse_flags "$@"
WATCH=0
[[ ${REST[0]:-} == --watch ]] && WATCH=1 && REST=("${REST[@]:1}")
no_more_flags
read_env

request() {
  local options=()
  [[ ${SPOT:-0} -eq 1 ]] && options+=(--spot)
  [[ -n ${SERVICE_ACCOUNT:-} ]] && options+=("--service-account=$SERVICE_ACCOUNT")
  run gcloud compute tpus queued-resources create "$NAME" "${WHERE[@]}" "--node-id=$NAME" \
    "--accelerator-type=$ACCELERATOR_TYPE" "--runtime-version=$RUNTIME_VERSION" \
    --scopes=cloud-platform \
    "--metadata=diva-home=$HOME_IN_BUCKET" "--metadata-from-file=startup-script=$HERE/vm.sh" "${options[@]}"
}

state() {
  gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" '--format=value(state.state)'
}

upload
request
[[ $WATCH -eq 1 ]] || exit 0
[[ $WORKDIR == gs://* ]] || die "--watch checks WORKDIR for the end of the run: set WORKDIR to a gs:// path"
if [[ $DRY_RUN -eq 1 ]]; then
  echo "# every minute: if the state is SUSPENDED or FAILED, delete the request and create it again"
  run gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
  request
  exit 0
fi
until gcloud storage ls "$WORKDIR/done" >/dev/null 2>&1; do
  sleep 60
  now=$(state || echo UNKNOWN)
  echo "$(date -u +%FT%TZ) $NAME is $now"
  case $now in
    SUSPENDED | FAILED)
      run gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
      request
      ;;
  esac
done
echo "$NAME: the run is finished; delete the slice with tpu/delete.sh"
