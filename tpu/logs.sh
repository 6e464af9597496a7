#!/usr/bin/env bash
# Shows the output of the run until Ctrl-C.
#
#   tpu/logs.sh [--worker=N] [--lines=N] [--env=FILE] [--dry-run] [--help]
#
# Only process 0 reports progress, and it is not always on worker 0. --worker=all shows the output of every machine.
set -euo pipefail
source "$(dirname "$0")/common.sh"

parse_flags "$@"
WORKER=0
LINES_BACK=100
for flag in "${REST[@]}"; do
  case $flag in
    --worker=*) WORKER=${flag#--worker=} ;;
    --lines=*) LINES_BACK=${flag#--lines=} ;;
    *) die "unknown flag $flag: see $0 --help" ;;
  esac
done
read_env
on_workers "$WORKER" "journalctl --unit=diva_jax --lines=$LINES_BACK --follow --output=cat"
