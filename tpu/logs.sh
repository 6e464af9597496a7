#!/usr/bin/env bash
# Shows the output of the set-up and of the run until Ctrl-C.
#
#   tpu/logs.sh [--worker=N] [--lines=N] [--env=FILE] [--dry-run] [--help]
#
# The set-up is the slice's start-up script: where it fails, as with a wrong bucket or package, there is no run.
# Only process 0 reports progress, and it is not always on worker 0. --worker=all shows the output of every machine.
set -euo pipefail
source "$(dirname "$0")/common.sh"

parse_flags "$@"
[[ ${#PASSED[@]} -eq 0 ]] || die "unknown flag ${PASSED[0]}: see $0 --help"
read_env
follow "${REST[@]}"
