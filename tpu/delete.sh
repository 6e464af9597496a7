#!/usr/bin/env bash
# Stops the run, which saves a checkpoint, and gives the slice back. Bucket and workdir stay.
#
#   tpu/delete.sh [--env=FILE] [--dry-run] [--help]
set -euo pipefail
source "$(dirname "$0")/common.sh"

parse_flags "$@"
no_more_flags
read_env
# A slice that is gone already, or not there yet, has nothing to stop.
on_workers all "sudo /opt/diva_jax/vm.sh stop" || echo "no machine to stop"
run gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
