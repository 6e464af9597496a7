#!/usr/bin/env bash
# Shows the state of the request and, for an existing slice, whether each machine is training and its last log line.
#
#   tpu/status.sh [--env=FILE] [--dry-run] [--help]
set -euo pipefail
source "$(dirname "$0")/common.sh"

parse_flags "$@"
no_more_flags
read_env
run gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" '--format=value(state.state)'
run gcloud compute tpus tpu-vm describe "$NAME" "${WHERE[@]}" '--format=value(state,health)'
last_lines
