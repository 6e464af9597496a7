#!/usr/bin/env bash
# The run of the env file on GKE, as a JobSet on one TPU slice: preempted or failed, it starts again and resumes.
#
#   tpu/gke/run.sh pool|launch|logs|status|delete|render|xpk [--env=FILE] [--dry-run] [--help]
#
# pool: makes the node pool of the slice: spot, flex-start or on demand as SPOT says; for a TPU7x also its placement policy.
# launch: stops the run, if there is one, and starts it with the present env file. Needs the image: see tpu/gke/Dockerfile.
# logs: follows the output of process 0; Ctrl-C does not affect the run.
# status: the JobSet and its pods.
# delete: saves, stops, and deletes the JobSet. The node pool stays, and costs money until it is deleted with gcloud.
# render: prints the manifest, tpu/gke/jobset.yaml with its variables.
# xpk: prints the `xpk workload create` command of the same run, for a cluster that xpk made.
set -euo pipefail
source "$(dirname "$0")/../common.sh"

parse_flags "$@"
WHAT=${REST[0]:-}
REST=("${REST[@]:1}")
no_more_flags
NEEDS=(TOPOLOGY CLUSTER IMAGE)
read_env
read_topology
ARGUMENTS=()
read -r -d '' -a ARGUMENTS <<<"${FLAGS:-}" || true # Of all lines.
ARGUMENTS=("--config=$CONFIG" "--workdir=$WORKDIR" "${ARGUMENTS[@]}")

pool() {
  local options=("--num-nodes=$MACHINES")
  case $CAPACITY in
    spot) options+=(--spot) ;;
    flex-start)
      options=(--flex-start --num-nodes=0 --enable-autoscaling "--max-nodes=$MACHINES" --location-policy=ANY)
      options+=(--reservation-affinity=none --no-enable-autorepair)
      ;;
  esac
  if [[ $CHIP == tpu7x && $MACHINES -gt 1 ]]; then
    create_policy
    options+=("--placement-policy=$NAME")
  elif [[ $MACHINES -gt 1 ]]; then
    options+=("--tpu-topology=$SHAPE")
  fi
  run gcloud container node-pools create "$NAME" "--cluster=$CLUSTER" "--project=$PROJECT" "--location=$REGION" \
    "--node-locations=$ZONE" "--machine-type=$MACHINE_TYPE" --workload-metadata=GKE_METADATA \
    --scopes=cloud-platform "${options[@]}"
}

render() {
  case $CAPACITY in
    spot) CAPACITY_LABEL='cloud.google.com/gke-spot: "true"' ;;
    flex-start) CAPACITY_LABEL='cloud.google.com/gke-flex-start: "true"' ;;
    on-demand) CAPACITY_LABEL= ;;
  esac
  export SELFCHECK=${SELFCHECK:-1} MOUNT=${MOUNT:-/gcs} NAME MACHINES GKE_ACCELERATOR SHAPE CAPACITY_LABEL IMAGE BUCKET
  python3 -c '
import json, os, string, sys
text = string.Template(open(sys.argv[1]).read())
print(text.substitute(os.environ, ARGS=json.dumps(sys.argv[2:])), end="")' "$HERE/gke/jobset.yaml" "${ARGUMENTS[@]}"
}

xpk() {
  local type=${CHIP/v5e/v5litepod}-$SHAPE capacity=--$CAPACITY
  [[ $CAPACITY != flex-start ]] || capacity=--flex
  local command=diva-train-until-done
  [[ ${SELFCHECK:-1} -eq 1 ]] || command="env SELFCHECK=0 $command"
  DRY_RUN=1
  run xpk workload create "--cluster=$CLUSTER" "--project=$PROJECT" "--zone=$ZONE" "--workload=$NAME" \
    "--tpu-type=$type" --num-slices=1 "$capacity" "--docker-image=$IMAGE" --max-restarts=1000 \
    --restart-on-exit-codes=1,75 --termination-grace-period-seconds=600 \
    "--command=$command $(printf '%q ' "${ARGUMENTS[@]}")"
}

SELECTOR="--selector=jobset.sigs.k8s.io/jobset-name=$NAME"
case $WHAT in
  pool) pool ;;
  render) render ;;
  launch)
    MANIFEST=$(render) # Before the run is stopped.
    run kubectl delete jobset "$NAME" --ignore-not-found --cascade=foreground
    if [[ $DRY_RUN -eq 1 ]]; then echo "$MANIFEST"; else kubectl apply --filename=- <<<"$MANIFEST"; fi
    ;;
  logs) run kubectl logs --follow --tail=100 "$SELECTOR,batch.kubernetes.io/job-completion-index=0" ;;
  status) run kubectl get jobset,pods "$SELECTOR" --output=wide ;;
  delete) run kubectl delete jobset "$NAME" --cascade=foreground ;;
  xpk) xpk ;;
  *) die "say what to do, pool, launch, logs, status, delete, render or xpk: see $0 --help" ;;
esac
