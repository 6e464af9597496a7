#!/usr/bin/env bash
# Runs as root on the machines of a slice: at every start (as the slice's start-up script), and over ssh.
#
#   vm.sh [boot|setup|start|train|stop] [--dry-run] [--help]
#
# boot: setup, then start.
# setup: installs the code from the bucket and mounts the bucket.
# start: runs train as a service, which is restarted until the run is finished.
# train: runs tpu/train.sh, which checks the devices and trains.
# stop: sends SIGTERM, upon which the run saves a checkpoint and stops.
set -euo pipefail

ROOT=/opt/diva_jax
DRY_RUN=0
WHAT=boot
for word in "$@"; do
  case $word in
    boot | setup | start | train | stop) WHAT=$word ;;
    --dry-run) DRY_RUN=1 ;;
    --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 0 ;;
    *) echo "error: unknown argument $word: see $0 --help" >&2 && exit 2 ;;
  esac
done

run() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  [[ $DRY_RUN -eq 1 ]] || "$@"
}

metadata() {
  curl --silent --show-error --fail --header 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

read_env() {
  if [[ $DRY_RUN -eq 1 ]]; then
    HOME_IN_BUCKET='gs://BUCKET/diva_jax/NAME' BUCKET=BUCKET MOUNT=/gcs CONFIG=CONFIG WORKDIR=WORKDIR FLAGS=FLAGS
    ENVIRONMENT=NAME=value SELFCHECK=1
    return
  fi
  mkdir -p "$ROOT"
  [[ -x $ROOT/vm.sh ]] || install --mode=755 "$0" "$ROOT/vm.sh" # For tpu/setup.sh, also where this set-up fails.
  HOME_IN_BUCKET=$(metadata diva-home)
  gcloud storage cp "$HOME_IN_BUCKET/env.sh" "$ROOT/env.sh"
  # shellcheck source=env.example
  source "$ROOT/env.sh"
}

setup() {
  run gcloud storage cp "$HOME_IN_BUCKET/diva_jax.tar.gz" "$ROOT/"
  run rm -rf "$ROOT/diva_jax"
  run tar --extract --gzip --file="$ROOT/diva_jax.tar.gz" --directory="$ROOT"
  run install --mode=755 "$ROOT/diva_jax/tpu/vm.sh" "$ROOT/vm.sh"
  command -v pip >/dev/null || install_pip
  run env PIP_BREAK_SYSTEM_PACKAGES=1 pip install --quiet uv # Which Ubuntu 24.04 otherwise refuses.
  [[ -x $ROOT/venv/bin/python ]] || run uv venv --python 3.11 "$ROOT/venv"
  run uv pip install --python "$ROOT/venv/bin/python" --constraint "$ROOT/diva_jax/constraints.txt" "$ROOT/diva_jax[tpu]"
  [[ -z ${MOUNT:-} ]] || mount_bucket
}

# Ubuntu's own images have none; at a start, apt may be busy with updates.
install_pip() {
  run apt-get --quiet update
  run apt-get --quiet --yes -o DPkg::Lock::Timeout=600 install python3-pip
}

mount_bucket() {
  mountpoint --quiet "$MOUNT" && return
  if ! command -v gcsfuse >/dev/null && [[ $DRY_RUN -eq 0 ]]; then
    echo "error: gcsfuse is not installed: install it, or use only gs:// paths and an empty MOUNT" >&2
    exit 2
  fi
  run mkdir -p "$MOUNT"
  run gcsfuse --implicit-dirs -o allow_other "$BUCKET" "$MOUNT"
}

# systemd restarts the service after a failure, sends SIGTERM at shutdown, and waits until the checkpoint is saved.
unit() {
  cat <<END
[Unit]
Description=diva_jax training
After=network-online.target

[Service]
ExecStart=$ROOT/vm.sh train
Restart=on-failure
RestartSec=30
RestartPreventExitStatus=2
TimeoutStopSec=600
END
}

start() {
  if [[ $DRY_RUN -eq 1 ]]; then
    unit
  else
    unit >/etc/systemd/system/diva_jax.service
  fi
  run systemctl daemon-reload
  run systemctl restart diva_jax
}

train() {
  local flags variable variables
  read -r -d '' -a variables <<<"${ENVIRONMENT:-}" || true # Of all lines.
  for variable in "${variables[@]}"; do
    echo "+ export ${variable%%=*}=..." # Values may be secrets.
    export "${variable?}"
  done
  read -r -d '' -a flags <<<"${FLAGS:-}" || true
  run cd "$ROOT/diva_jax"
  run exec env PYTHONUNBUFFERED=1 "SELFCHECK=${SELFCHECK:-1}" "PYTHON=$ROOT/venv/bin/python" tpu/train.sh \
    "--config=$CONFIG" "--workdir=$WORKDIR" "${flags[@]}"
}

[[ $WHAT == stop ]] || read_env
case $WHAT in
  boot)
    setup
    start
    ;;
  stop) run systemctl stop diva_jax || [[ $? -eq 5 ]] ;; # 5: the set-up has not made the service yet.
  *) "$WHAT" ;;
esac
