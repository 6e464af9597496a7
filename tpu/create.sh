#!/usr/bin/env bash
# Requests a v5e or v4 slice that installs diva_jax and starts training as soon as it is available.
#
#   tpu/create.sh [--env=FILE] [--dry-run] [--help] [-- OPTION...]
#
# Each OPTION after -- is passed to `gcloud compute tpus queued-resources create`, e.g. -- --valid-until-duration=6h
# --network=my-net; CREATE_OPTIONS in the env file does the same.
#
# The script uploads the code of the current commit and the env file to the bucket, then creates a queued resource. The
# machines of the slice run tpu/vm.sh at every start, so a restarted machine resumes training. A preempted spot slice
# is gone: tpu/delete.sh and tpu/create.sh request it again. On GKE (tpu/gke/run.sh) that happens by itself.
set -euo pipefail
source "$(dirname "$0")/common.sh"

parse_flags "$@"
[[ ${#REST[@]} -eq 0 ]] || die "unknown flag ${REST[0]}: see $0 --help; options of gcloud come after --"
NEEDS=(ACCELERATOR_TYPE RUNTIME_VERSION)
read_env
[[ $CAPACITY != flex-start ]] || die "tpu/create.sh has no flex-start: set SPOT=1 or 0, or use tpu/gke/run.sh or tpu/mig.sh"

options=()
read -r -a options <<<"${CREATE_OPTIONS:-}"
[[ $CAPACITY != spot ]] || options+=(--spot)
[[ -z ${SERVICE_ACCOUNT:-} ]] || options+=("--service-account=$SERVICE_ACCOUNT")
upload
run gcloud compute tpus queued-resources create "$NAME" "${WHERE[@]}" "--node-id=$NAME" \
  "--accelerator-type=$ACCELERATOR_TYPE" "--runtime-version=$RUNTIME_VERSION" \
  --scopes=cloud-platform \
  "--metadata=diva-home=$HOME_IN_BUCKET" "--metadata-from-file=startup-script=$HERE/vm.sh" "${options[@]}" "${PASSED[@]}"
