"""Tests of the launch scripts: the commands of a dry run, help, error messages, and shellcheck."""

import json
import os
import re
import sys
import tempfile
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from commands import finish, launch, output
from places import ROOT

TPU = ROOT / "tpu"
EXAMPLE = (TPU / "env.example").read_text().replace("my-project", "a-project").replace("my-bucket", "a-bucket")


def env(**fields) -> str:
    """The flag of a file that is env.example with other values."""
    text, file = EXAMPLE, Path(tempfile.mkdtemp(prefix="diva_jax_env_")) / "env.sh"
    for name, value in fields.items():
        text = re.sub(rf"^{name}=.*", f"{name}={value}", text, flags=re.MULTILINE)
    file.write_bytes(text.encode())
    return f"--env={file}"


# A bucket and a name that YAML would take for a number and for a truth value.
ENV, SPOT = env(), env(CLUSTER="c", IMAGE="i", BUCKET="2026", NAME="on")
FLEX = env(CLUSTER="c", IMAGE="i", SPOT="flex-start", TOPOLOGY="tpu7x:2x2x2")


# Scripts, values in place of those of env.example, flags, and what is printed, or the error; names are those that
# Google gives. Values of the environment may be secrets, which are not printed.
CASES = json.loads(Path(__file__).with_name("scripts.json").read_text())


@pytest.mark.parametrize("scripts, fields, flags, has, lacks", CASES["printed"])
def test_what_is_printed(scripts, fields, flags, has, lacks):
    for script in scripts.split():
        printed = output(launch(TPU / script, "--dry-run", *([] if fields is None else [env(**fields)]), *flags))
        assert not [words for words in has if words not in printed] and not (lacks and lacks in printed), printed
        assert all("--project=a-project" in line for line in re.findall(r"\+ gcloud (?!storage).*", printed))


@pytest.mark.parametrize("scripts, fields, flags, said", CASES["refused"])
def test_what_cannot_be_is_refused_in_a_dry_run_too(scripts, fields, flags, said):
    """In one sentence, before anything is uploaded."""
    for script in scripts.split():
        code, out, err = finish(launch(TPU / script, env(**fields), *flags, "--dry-run"), seconds=60)
        assert code == 2 and not out and err.startswith("error: ") and said in err and err.count("\n") == 1, err


def stub(file, then):
    """A command that notes its arguments in the file `ran` beside it."""
    file.write_text(f'#!/bin/sh\necho "$*" >>{file.parent}/ran\n{then}\n')
    file.chmod(0o755)
    return file


@pytest.mark.parametrize("script, fields, flags, fails, code, said, has, lacks", CASES["failing"])
def test_commands_that_fail(tmp_path, script, fields, flags, fails, code, said, has, lacks):
    """Of three machines, whose policy is that of 4x4, with the commands that were run up to the end."""
    known = "*list-instances*) printf 'm-0\\nm-1\\nm-2\\n' ;; *describe*) echo 4x4 ;;"
    for name in ("gcloud", "kubectl", "python3"):
        stub(tmp_path / name, f'case "$0 $*" in *"{fails or "never"}"*) exit 3 ;; {known} esac')
    found, _, err = finish(launch(TPU / script, *flags, env(**fields), PATH=f"{tmp_path}:{os.environ['PATH']}"), 60)
    ran = (tmp_path / "ran").read_text()
    assert found == code and said in err and not [words for words in has if words not in ran] and lacks not in ran


def test_a_machine_can_be_set_up_again_where_its_start_failed(tmp_path):
    """By tpu/setup.sh, which runs the script that is kept at the start."""
    (boot := tmp_path / "boot").write_text((TPU / "vm.sh").read_text().replace("/opt", str(tmp_path)))
    stub(tmp_path / "curl", "echo gs://b/h")
    stub(tmp_path / "gcloud", "exit 3")
    assert finish(launch("bash", boot, PATH=f"{tmp_path}:{os.environ['PATH']}"))[0] == 3
    assert "setup" in output(launch(tmp_path / "diva_jax/vm.sh", "--help"))


def test_what_is_not_committed_is_said(tmp_path):
    """In a clone with one file more than its commit."""
    commit = "git -c user.name=a -c user.email=a@b commit --quiet --allow-empty --message=scripts"
    clone = f"git clone --quiet {ROOT} clone && cp -r {TPU} clone && cd clone && git add --all && {commit}"
    output(launch("sh", "-c", clone, cwd=tmp_path))
    seen = []
    for _ in range(2):
        seen.append(finish(launch(tmp_path / "clone/tpu/create.sh", "--dry-run", ENV))[2])
        (tmp_path / "clone/new.py").write_text("")
    assert "not committed" not in seen[0] and "not committed" in seen[1] and "new.py" in seen[1]


@pytest.mark.parametrize("check, ran", [("1", ["selfcheck", "main", "-c"]), ("0", ["main", "-c"])])
@pytest.mark.parametrize("checked", [0, 1])
def test_the_devices_are_checked_before_every_training(tmp_path, check, ran, checked):
    """With the fields of the config alone, since other flags are those of training; what is found ends nothing."""
    own = stub(tmp_path / "python", f"case $2 in *selfcheck) exit {checked} ;; esac")
    flags = ("--config=c.py", "--workdir=run", "--config.steps=3", "--lost_timeout=9")
    code, _, err = finish(launch(TPU / "train.sh", *flags, PYTHON=own, SELFCHECK=check))
    lines = (tmp_path / "ran").read_text().splitlines()
    assert code == 0 and [line.removeprefix("-m diva_jax.").split()[0] for line in lines] == ran
    if check == "1":
        assert lines[0] == f"-m diva_jax.selfcheck --unless_kept {' '.join(flags[:3])}"
        assert ("the selfcheck failed" in err) == bool(checked)
    assert lines[-2] == f"-m diva_jax.main {' '.join(flags)}"


@pytest.mark.parametrize("check", ["1", "0"])
def test_a_signal_ends_what_runs_and_starts_nothing_else(tmp_path, check):
    """Also where Python has no handler yet, and where the signal comes before the script knows its child."""
    own = stub(tmp_path / "python", "kill -TERM $PPID\nexec sleep 60")
    process = launch(TPU / "train.sh", "--config=c.py", "--workdir=run", PYTHON=own, SELFCHECK=check)
    assert finish(process, 30)[0] == 75 and (tmp_path / "ran").read_text().count("\n") == 1


def test_shellcheck():
    scripts = sorted([*TPU.glob("*.sh"), *TPU.glob("gke/*.sh")])
    output(launch(Path(sys.executable).with_name("shellcheck"), "--external-sources", *scripts))


GKE = [(SPOT, "tpu-v5-lite-podslice", "4x4", 4, "gke-spot"), (FLEX, "tpu7x", "2x2x2", 2, "gke-flex-start")]


@pytest.mark.parametrize("env, chip, shape, machines, capacity", GKE, ids=["v5e", "tpu7x"])
def test_the_jobset_is_valid_and_restarts_but_not_a_wrong_command(env, chip, shape, machines, capacity):
    """Its jobs by the schema of Kubernetes 1.36, in which no unknown field passes; its own fields are those of
    JobSet's definition (v1alpha2), against which the whole manifest was validated in November 2026."""
    found = yaml.safe_load(output(launch(TPU / "gke/run.sh", "render", env)))
    assert set(found) == {"apiVersion", "kind", "metadata", "spec"}
    assert found["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    # `run.sh status` asks for what has the label that JobSet gives to jobs and pods alone.
    assert found["metadata"]["labels"] == {"jobset.sigs.k8s.io/jobset-name": found["metadata"]["name"]}
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
