#!/usr/bin/env bash
# Installs the code of the current commit on every machine of a slice that is already there.
#
#   tpu/setup.sh [--env=FILE] [--dry-run] [--help]
#
# A new slice does this by itself when it starts. The run is not restarted: tpu/launch.sh does that.
set -euo pipefail
source "$(dirname "$0")/common.sh"

parse_flags "$@"
no_more_flags
read_env
upload
on_workers all "sudo /opt/diva_jax/vm.sh setup"
