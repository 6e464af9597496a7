#!/usr/bin/env bash
# Installs the code of the current commit on every machine of an existing slice.
#
#   tpu/setup.sh [--env=FILE] [--dry-run] [--help]
#
# A new slice installs the code when it starts. This script does not restart the run; use tpu/launch.sh for that.
set -euo pipefail
source "$(dirname "$0")/common.sh"

parse_flags "$@"
no_more_flags
read_env
install_code
