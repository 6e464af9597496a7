#!/usr/bin/env bash
# Trains as one process of a run, with the arguments of diva_jax.main; the entry point of the image and of vm.sh.
#
#   tpu/train.sh --config=... --workdir=... [FLAG...] [--help]
#
# Before, python -m diva_jax.selfcheck checks the devices for --config, unless its result is kept already or SELFCHECK=0
# is set. SIGTERM is passed on, also where this is process 1 of a container; the run then saves a checkpoint. The exit code is 0
# where the run is finished, 75 where it ended before its last step and must be started again, and that of diva_jax.main
# otherwise: 2 for a command that can never work.
set -euo pipefail

PYTHON=${PYTHON:-python}
WORKDIR=
CHECKED=() # Flags of the check; others are of diva_jax.main.
for flag in "$@"; do
  case $flag in
    --config=* | --config.*) CHECKED+=("$flag") ;;
    --workdir=*) CHECKED+=("$flag") WORKDIR=${flag#--workdir=} ;;
    --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 0 ;;
  esac
done
[[ -n $WORKDIR ]] || { echo "error: --workdir=FOLDER is missing" >&2 && exit 2; }

# From now on a signal is passed on to the CHILD, if there is one, and noted in ASKED.
ASKED=0 CHILD=
pass_on() {
  ASKED=1
  [[ -z $CHILD ]] || kill -TERM "$CHILD" 2>/dev/null || true
}
trap pass_on TERM INT

# Runs a module with flags, and sets CODE to its exit code.
python_module() {
  "$PYTHON" -m "$@" &
  CHILD=$! CODE=0
  [[ $ASKED -eq 0 ]] || pass_on # The signal came before there was a child.
  wait "$CHILD" || CODE=$?
  while kill -0 "$CHILD" 2>/dev/null; do # A signal ended the wait and not the run.
    CODE=0
    wait "$CHILD" || CODE=$?
  done
}

if [[ ${SELFCHECK:-1} == 1 ]]; then
  python_module diva_jax.selfcheck --unless_kept "${CHECKED[@]}"
  [[ $ASKED -eq 0 ]] || exit 75
  [[ $CODE -eq 0 ]] || echo "note: the selfcheck failed, see above; training is started all the same" >&2
fi
python_module diva_jax.main "$@"
[[ $ASKED -eq 0 || $CODE -lt 128 ]] || exit 75 # Python was still starting, and ended by the signal.
[[ $CODE -eq 0 ]] || exit "$CODE"
# Exit code 0 before the last step: this or another process received SIGTERM.
"$PYTHON" -c 'import sys; from etils import epath; sys.exit(not (epath.Path(sys.argv[1]).expanduser() / "done").exists())' "$WORKDIR" ||
  exit 75
