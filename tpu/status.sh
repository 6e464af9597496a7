#!/usr/bin/env bash
# Says where the request stands, and for a slice that is there, whether each machine trains and its last line.
#
#   tpu/status.sh [--env=FILE] [--dry-run] [--help]
set -euo pipefail
source "$(dirname "$0")/common.sh"

parse_flags "$@"
no_more_flags
read_env
run gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" '--format=value(state.state)'
run gcloud compute tpus tpu-vm describe "$NAME" "${WHERE[@]}" '--format=value(state,health)'
on_workers all "hostname; systemctl is-active diva_jax; journalctl --unit=diva_jax --lines=1 --output=cat"
