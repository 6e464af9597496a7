"""The entry point of the image with the arguments of the JobSet, as two processes on this machine."""

import os
import sys

import yaml
from commands import finish, launch, output, wait_for_step
from places import ROOT, SUPPORT
from processes import FIELDS, free_address

TPU = ROOT / "tpu"


def test_a_preempted_jobset_starts_again_and_finishes(files, tmp_path):
    """SIGTERM to process 1 of a pod, the shell, reaches its child; both pods fail, so that JobSet starts both again."""
    flags = " ".join(f"--config.{name}={value}" for name, value in FIELDS.items()) + " --lost_timeout=10"
    own = dict(PROJECT="p", BUCKET="b", CLUSTER="c", IMAGE="i", FLAGS=f'"{flags}"', WORKDIR=tmp_path / "run")
    config = f"{SUPPORT}/e2e_config.py:outside.rotations:{files}"
    own |= dict(CONFIG=config, NAME="n", ZONE="us-west4-a", TOPOLOGY="v5e:2x4")
    (tmp_path / "env.sh").write_text("".join(f"{name}={value}\n" for name, value in own.items()))
    manifest = yaml.safe_load(output(launch(TPU / "gke/run.sh", "render", f"--env={tmp_path / 'env.sh'}")))
    spec = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    arguments, count = spec["template"]["spec"]["containers"][0]["args"], spec["completions"]

    def pods(*more):
        shared = dict(
            PYTHON=sys.executable, SELFCHECK="0", JAX_COORDINATOR_ADDRESS=free_address(), JAX_NUM_PROCESSES=str(count)
        )
        return [launch(TPU / "train.sh", *arguments, *more, JAX_PROCESS_ID=str(i), **shared) for i in range(count)]

    first = pods()
    wait_for_step(first[0], 2)
    first[1].terminate()
    assert [code for code, _, _ in map(finish, first)] == [75, 75]
    ends = [finish(pod) for pod in pods()]
    assert [code for code, _, _ in ends] == [0, 0] and "resumed from the checkpoint of step" in ends[0][1], ends
    code, _, err = finish(
        launch(TPU / "train.sh", *arguments, "--config.batch_size=x", PYTHON=sys.executable, SELFCHECK="0")
    )
    assert code == 2 and err.startswith("error: "), "which ends the JobSet"
    assert os.access(TPU / "train.sh", os.X_OK)
