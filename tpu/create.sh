#!/usr/bin/env bash
# Requests a TPU slice that installs diva_jax and starts training as soon as it is available.
#
#   tpu/create.sh [--watch] [--delete-when-done] [--env=FILE] [--dry-run] [--help] [-- OPTION...]
#
# Each OPTION after -- is passed to `gcloud compute tpus queued-resources create`, e.g. -- --valid-until-duration=6h
# --network=my-net; CREATE_OPTIONS in the env file does the same.
#
# The script uploads the code of the current commit and the env file to the bucket, then creates a queued resource. The
# machines of the slice run tpu/vm.sh at every start, so a restarted machine resumes training. A preempted spot slice is
# deleted; with --watch, this command keeps running and requests a new slice each time until the run is finished. With
# --delete-when-done it watches too, and then deletes the slice, which otherwise costs money until tpu/delete.sh.
set -euo pipefail
source "$(dirname "$0")/common.sh"

parse_flags "$@"
WATCH=0
DELETE=0
for flag in "${REST[@]}"; do
  case $flag in
    --watch) WATCH=1 ;;
    --delete-when-done) WATCH=1 DELETE=1 ;;
    *) die "unknown flag $flag: see $0 --help; options of gcloud come after --" ;;
  esac
done
read_env
[[ $WATCH -eq 0 || $WORKDIR == gs://* ]] || die "--watch checks WORKDIR for the end of the run: set WORKDIR to a gs:// path"

request() {
  local options=()
  read -r -a options <<<"${CREATE_OPTIONS:-}"
  [[ ${SPOT:-0} -eq 1 ]] && options+=(--spot)
  [[ -n ${SERVICE_ACCOUNT:-} ]] && options+=("--service-account=$SERVICE_ACCOUNT")
  run gcloud compute tpus queued-resources create "$NAME" "${WHERE[@]}" "--node-id=$NAME" \
    "--accelerator-type=$ACCELERATOR_TYPE" "--runtime-version=$RUNTIME_VERSION" \
    --scopes=cloud-platform \
    "--metadata=diva-home=$HOME_IN_BUCKET" "--metadata-from-file=startup-script=$HERE/vm.sh" "${options[@]}" "${PASSED[@]}"
}

delete() {
  run gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
}

state() {
  gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" '--format=value(state.state)'
}

upload
request
[[ $WATCH -eq 1 ]] || exit 0
if [[ $DRY_RUN -eq 1 ]]; then
  echo "# every minute: if the state is SUSPENDED or FAILED, delete the request and create it again"
  delete
  request
  if [[ $DELETE -eq 1 ]]; then
    echo "# when $WORKDIR/done exists"
    delete
  fi
  exit 0
fi
until gcloud storage ls "$WORKDIR/done" >/dev/null 2>&1; do
  sleep 60
  now=$(state || echo UNKNOWN)
  echo "$(date -u +%FT%TZ) $NAME is $now"
  case $now in
    SUSPENDED | FAILED)
      delete
      request
      ;;
  esac
done
if [[ $DELETE -eq 1 ]]; then
  echo "$NAME: the run is finished; the slice is deleted"
  delete
else
  echo "$NAME: the run is finished; delete the slice with tpu/delete.sh"
fi
