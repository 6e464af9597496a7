#!/usr/bin/env bash
# Stops the run, which saves a checkpoint, and deletes the slice. Bucket and workdir are kept.
#
#   tpu/delete.sh [--env=FILE] [--dry-run] [--help]
set -euo pipefail
source "$(dirname "$0")/common.sh"

parse_flags "$@"
no_more_flags
read_env
# There is no run to stop if the slice does not exist.
on_workers all "sudo /opt/diva_jax/vm.sh stop" || echo "no machine to stop"
run gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
