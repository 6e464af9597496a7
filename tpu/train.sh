#!/usr/bin/env bash
# Trains as one process of a run, with the arguments of diva_jax.main; the entry point of the image and of vm.sh.
#
#   tpu/train.sh --config=... --workdir=... [FLAG...] [--help]
#
# SIGTERM is passed on, also where this is process 1 of a container; the run then saves a checkpoint. The exit code is 0
# where the run is finished, 75 where it ended before its last step and must be started again, and that of diva_jax.main
# otherwise: 2 for a command that can never work.
set -euo pipefail

PYTHON=${PYTHON:-python}
WORKDIR=
for flag in "$@"; do
  case $flag in
    --workdir=*) WORKDIR=${flag#--workdir=} ;;
    --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 0 ;;
  esac
done
[[ -n $WORKDIR ]] || { echo "error: --workdir=FOLDER is missing" >&2 && exit 2; }

"$PYTHON" -m diva_jax.main "$@" &
CHILD=$!
trap 'kill -TERM "$CHILD" 2>/dev/null || true' TERM INT
CODE=0
wait "$CHILD" || CODE=$?
while kill -0 "$CHILD" 2>/dev/null; do # A signal ended the wait and not the run.
  CODE=0
  wait "$CHILD" || CODE=$?
done
[[ $CODE -eq 0 ]] || exit "$CODE"
# Exit code 0 before the last step: this or another process received SIGTERM.
"$PYTHON" -c 'import sys; from etils import epath; sys.exit(not (epath.Path(sys.argv[1]) / "done").exists())' "$WORKDIR" ||
  exit 75
