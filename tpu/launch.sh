#!/usr/bin/env bash
# Starts the run described by the env file on every machine of the slice, or restarts it after the env file changed.
#
#   tpu/launch.sh [--env=FILE] [--dry-run] [--help]
#
# A run in progress first saves a checkpoint and stops. With the same workdir, training resumes from the last
# checkpoint. Every start is that of tpu/train.sh, which first checks the devices, once, unless the env file has SELFCHECK=0.
# The env file is also uploaded to the bucket, so that machines that start later run the same command.
set -euo pipefail
source "$(dirname "$0")/common.sh"

parse_flags "$@"
no_more_flags
read_env
restart
