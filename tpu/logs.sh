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
on_workers "$WORKER" "sudo journalctl --unit=google-startup-scripts --unit=diva_jax --lines=$LINES_BACK --follow --output=cat"
