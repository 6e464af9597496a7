#!/usr/bin/env bash
# Stops the run, which saves a checkpoint, and deletes the slice. Bucket and workdir are kept.
#
#   tpu/delete.sh [--env=FILE] [--dry-run] [--help]
set -euo pipefail
source "$(dirname "$0")/common.sh"

parse_flags "$@"
no_more_flags
read_env
stop
run gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
