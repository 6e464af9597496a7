#!/usr/bin/env bash
# A v5p, v6e or TPU7x slice as a managed instance group of Compute Engine, which trains as soon as it is there.
#
#   tpu/mig.sh create|setup|launch|logs|status|delete [--worker=N] [--lines=N] [--env=FILE] [--dry-run] [--help]
#
# create: uploads the code of the current commit and the env file, and makes the policy of the slice, the template of its
#   machines and the group. Options after -- are passed to `gcloud compute instance-templates create`. With
#   SPOT=flex-start, all machines come at once, when there is capacity, and are deleted after MAX_RUN.
# setup, launch, logs: as tpu/setup.sh, tpu/launch.sh and tpu/logs.sh for queued resources.
# status: the state of the group and of each machine.
# delete: saves, stops and deletes the slice; bucket and workdir are kept.
#
# Compute Engine starts the machines of a slice again after a failure, and tpu/vm.sh then resumes the run. A preempted
# spot slice must be deleted and created again.
set -euo pipefail
source "$(dirname "$0")/common.sh"

parse_flags "$@"
WHAT=${REST[0]:-}
for flag in "${REST[@]:1}"; do
  [[ $WHAT == logs && ($flag == --worker=* || $flag == --lines=*) ]] || die "unknown flag $flag: see $0 --help"
done
[[ $WHAT == create || ${#PASSED[@]} -eq 0 ]] || die "options after -- are for $0 create"
NEEDS=(TOPOLOGY)
read_env
read_topology
[[ $CHIP != v4 && $CHIP != v5e ]] || die "TOPOLOGY=$TOPOLOGY: v4 and v5e have no instance groups: use tpu/gke/run.sh or tpu/create.sh"
MIG=1

create() {
  local options=() again="see above, and run $0 delete before you create it again"
  case $CAPACITY in
    spot) options=(--provisioning-model=SPOT --instance-termination-action=STOP) ;;
    flex-start)
      options=(--provisioning-model=FLEX_START --instance-termination-action=DELETE "--max-run-duration=${MAX_RUN:-7d}")
      options+=(--reservation-affinity=none)
      ;;
  esac
  [[ -z ${SERVICE_ACCOUNT:-} ]] || options+=("--service-account=$SERVICE_ACCOUNT")
  upload
  create_policy
  run gcloud compute instance-templates create "$NAME" "--project=$PROJECT" "--machine-type=$MACHINE_TYPE" \
    --image-project=ubuntu-os-accelerator-images "--image-family=$IMAGE_FAMILY" --boot-disk-size=200GB \
    --maintenance-policy=TERMINATE --scopes=cloud-platform "--metadata=diva-home=$HOME_IN_BUCKET" \
    "--metadata-from-file=startup-script=$HERE/vm.sh" "${options[@]}" "${PASSED[@]}" ||
    die "the template $NAME was not created: $again"
  run gcloud compute instance-groups managed create "$NAME" "${WHERE[@]}" "--template=$NAME" "--size=$MACHINES" \
    --default-action-on-vm-failure=do-nothing --target-size-policy-mode=bulk \
    "--workload-policy=projects/$PROJECT/regions/$REGION/resourcePolicies/$NAME" ||
    die "the group $NAME was not created: $again"
}

case $WHAT in
  create) create ;;
  setup) install_code ;;
  launch) restart ;;
  logs) follow "${REST[@]:1}" ;;
  status)
    run gcloud compute instance-groups managed describe "$NAME" "${WHERE[@]}" '--format=value(status)'
    last_lines
    ;;
  delete)
    stop
    CODE=0 # Whatever is there is deleted, also where `create` did not make all of it.
    run gcloud compute instance-groups managed delete "$NAME" "${WHERE[@]}" --quiet || CODE=$?
    run gcloud compute instance-templates delete "$NAME" "--project=$PROJECT" --quiet || CODE=$?
    run gcloud compute resource-policies delete "$NAME" "--project=$PROJECT" "--region=$REGION" --quiet || CODE=$?
    exit "$CODE"
    ;;
  *) die "say what to do, create, setup, launch, logs, status or delete: see $0 --help" ;;
esac
