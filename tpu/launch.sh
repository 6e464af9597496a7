#!/usr/bin/env bash
# Starts the run of the env file on every machine of the slice, or restarts it after a change of the env file.
#
#   tpu/launch.sh [--env=FILE] [--dry-run] [--help]
#
# A run that is going on is asked to save and stop first; the same workdir goes on from its last checkpoint. The env
# file is stored in the bucket as well, so that machines that start later run the same command.
set -euo pipefail
source "$(dirname "$0")/common.sh"

parse_flags "$@"
no_more_flags
read_env
run gcloud storage cp "$ENV_FILE" "$HOME_IN_BUCKET/env.sh"
on_workers all "sudo /opt/diva_jax/vm.sh stop"
on_workers all "sudo /opt/diva_jax/vm.sh start"
