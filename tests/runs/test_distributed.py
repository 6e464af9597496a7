"""Runs of several processes on this machine, with a process that is stopped, is killed, does not start or has other
data; the entry point of the image; saves that fail, data that does not come; where compiled programs are kept."""

import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import commands
import jax
import numpy as np
import processes
import pytest
import small
import yaml
from commands import launch, wait_for_step
from e2e_config import rotations
from etils import epath
from helpers import failed, refused, rows
from jax.experimental.compilation_cache import compilation_cache
from places import ROOT
from processes import FIELDS, ROTATIONS, STEPS, finish, free_address, record, start, start_all

from diva_jax.data import pipeline
from diva_jax.training import checkpoint, compiler, distributed, loop, metrics, workdirs

BATCH, IMAGES = 8, 24
TPU = ROOT / "tpu"


def run_here(files, workdir) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.Batches, "wait", pipeline.Batches.wait)  # `record` replaces both.
        patch.setattr(jax, "make_array_from_process_local_data", jax.make_array_from_process_local_data)
        record(f"{workdir}.here.rows")
        assert loop.Run(rotations(files, **FIELDS), workdir).run()


def seen(workdir) -> dict[tuple[int, int], int]:
    """Returns (step, row) -> checksum of the image, over all starts and processes; asserts that they agree."""
    rows = {}
    for file in workdir.parent.glob(f"{workdir.name}.*.rows"):
        for step, row, image in map(json.loads, file.read_text().splitlines()):
            assert rows.setdefault((step, row), image) == image, f"step {step}, row {row} of {file.name}"
    return rows


def losses(workdir) -> list[float]:
    assert [r["step"] for r in rows(workdir)] == list(range(1, STEPS + 1))
    return [r["loss"] for r in rows(workdir)]


def test_one_run_over_two_four_and_one_processes(files, tmp_path):
    """Two processes, one of which is sent SIGINT; then four, one of which is killed; then one to the last step."""
    workdir, alone = tmp_path / "run", tmp_path / "alone"
    two = start_all(files, workdir, 2, "--config.mesh.fsdp=2", "--config.mesh.min_shard=64")
    wait_for_step(two[0], 2)
    two[1].send_signal(signal.SIGINT)  # Which becomes SIGTERM.
    ends = finish(two)
    assert [code for code, _, _ in ends] == [0, 130] and ends[1][2].strip().endswith("interrupted"), ends
    saved = checkpoint.latest_step(workdir)
    assert 2 <= saved < STEPS and f"SIGTERM: saved step {saved}" in ends[0][1]
    assert not re.search("^(step|stage|total) ", ends[1][1], re.M), "only process 0 prints"
    four = start_all(files, workdir, 4, "--config.mesh.fsdp=2")
    wait_for_step(four[0], saved + 2)
    four[2].kill()
    began = time.monotonic()
    ends = finish(four)
    assert time.monotonic() - began < 60
    for code, _, err in (ends[0], ends[1], ends[3]):
        assert code not in (0, 2) and ("lost another of the 4 processes" in err or "another task died" in err), err

    run_here(files, workdir)
    run_here(files, alone)
    np.testing.assert_allclose(losses(workdir), losses(alone), rtol=1e-5)
    whole = seen(alone)
    assert seen(workdir) == whole
    for first in range(1, STEPS + 1, IMAGES // BATCH):
        images = [image for (step, _), image in whole.items() if first <= step < first + IMAGES // BATCH]
        assert len(images) == len(set(images)) == IMAGES


def test_a_save_that_fails_on_one_machine_and_a_coordinator_that_falls_silent(files, tmp_path, monkeypatch):
    monkeypatch.setenv("FAILS_ON", "1")
    monkeypatch.setenv("FAILS", "1")
    fields = ("steps=4000", "mesh.fsdp=2", "mesh.min_shard=64", "checkpoint.every=3", "checkpoint.timeout=5")
    two = start_all(files, tmp_path / "run", 2, *(f"--config.{f}" for f in fields))
    assert re.search(r"^step \d+: saving failed, tried again", wait_for_step(two[0], 14), re.M)
    two[0].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    try:
        ((code, _, err),) = finish([two[1]])
    finally:
        two[0].kill()
    assert time.monotonic() - began < 60
    assert code not in (0, 2) and ("lost another of the 2 processes" in err or "another task died" in err), err
    assert checkpoint.steps(tmp_path / "run"), "the second try was whole"


def test_data_that_is_truncated_on_one_machine(files, tmp_path):
    fewer = tmp_path / "fewer"
    shutil.copytree(files / "photos", fewer)
    sorted(fewer.glob("*.tar"))[-1].unlink()
    address = free_address()
    whole = start(files, tmp_path / "run", address, 0, 2)
    short = start(files, tmp_path / "run", address, 1, 2, f"--config.data.path={fewer}")
    for code, _, err in finish([whole, short]):
        assert code == 2 and "error: " in err and "Traceback" not in err, err
        assert "the number of images in config.data.path is 24 for process 0 and 16 for process 1" in err
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("index", [0, 1])
def test_the_others_do_not_come(files, tmp_path, index):
    address = free_address()
    ((code, _, err),) = finish([start(files, tmp_path / "run", address, index, 2, "--join_timeout=2")])
    assert code == 2 and address in err and "on every machine" in err
    assert ("not all 2 processes" if index == 0 else "cannot reach the coordinator") in err
    assert len(err.strip().splitlines()) == 1 and "not found within 9 s" in distributed._not_met(9), err


def test_a_preempted_jobset_starts_again_and_finishes(files, tmp_path):
    """SIGTERM to process 1 of a pod, the shell, reaches its child; both pods fail, so that JobSet starts both again."""
    flags = " ".join(f"--config.{name}={value}" for name, value in FIELDS.items()) + " --lost_timeout=6"
    own = dict(PROJECT="p", BUCKET="b", CLUSTER="c", IMAGE="i", FLAGS=f'"{flags}"', WORKDIR=tmp_path / "run", NAME="n")
    own |= dict(CONFIG=f"{ROTATIONS.removeprefix('--config=')}{files}", ZONE="us-west4-a", TOPOLOGY="v5e:2x4")
    (tmp_path / "env.sh").write_text("".join(f"{name}={value}\n" for name, value in own.items()))
    rendered = commands.output(launch(TPU / "gke/run.sh", "render", f"--env={tmp_path / 'env.sh'}"))
    spec = yaml.safe_load(rendered)["spec"]["replicatedJobs"][0]["template"]["spec"]
    arguments, count = spec["template"]["spec"]["containers"][0]["args"], spec["completions"]
    shared = dict(PYTHON=sys.executable, SELFCHECK="0")

    def pods():
        env = shared | dict(JAX_COORDINATOR_ADDRESS=free_address(), JAX_NUM_PROCESSES=str(count))
        return [launch(TPU / "train.sh", *arguments, JAX_PROCESS_ID=str(i), **env) for i in range(count)]

    first = pods()
    wait_for_step(first[0], 2)
    first[1].terminate()
    assert [code for code, _, _ in finish(first)] == [75, 75]
    ends = finish(pods())
    assert [code for code, _, _ in ends] == [0, 0] and "resumed from the checkpoint of step" in ends[0][1], ends
    code, _, err = commands.finish(launch(TPU / "train.sh", *arguments, "--config.batch_size=x", **shared))
    assert code == 2 and err.startswith("error: "), "which ends the JobSet"


# Reads after which data stalls, lines after which a signal is sent, exit code, what is printed.
SIGNALS = ((signal.SIGTERM, 0), (signal.SIGINT, 130))
STALLS = [(30, {"stalled", "step 1/"}, sig, code, f"{sig.name}: saved step") for sig, code in SIGNALS]
STALLS += [(30, set(), None, 1, "config.data.stall_timeout=3")]
STALLS += [(10**6, {"outside.rotations: "}, signal.SIGTERM, 143, "SIGTERM: ")]  # The weights are loaded next.


@pytest.mark.attack
@pytest.mark.parametrize("reads, until, sig, code, said", STALLS)
def test_data_that_stalls(files, tmp_path, reads, until, sig, code, said):
    """A signal ends the run, which keeps what it has done; without one the read is named."""
    line = [f"{ROTATIONS}{files}", f"--workdir={tmp_path / 'run'}"] + ["--config.data.stall_timeout=3"] * (not sig)
    process = commands.start(processes.__file__, *line, READS=str(reads))
    while until and (line := next(process.stdout, "")):
        until = {text for text in until if not line.startswith(text)}
    if sig:
        process.send_signal(sig)
    began = time.monotonic()
    found, out, err = commands.finish(process, 200)
    assert found == code and said in out + err and "Traceback" not in err, (out, err)
    assert time.monotonic() - began < 30 if sig else ".tar/" in err, err
    assert bool(checkpoint.latest_step(tmp_path / "run")) >= ("saved step" in said)
    assert (err.strip().splitlines()[-1:] == ["interrupted"]) == (sig == signal.SIGINT), err


VARIABLES = {("host:1", None, "0"): "JAX_NUM_PROCESSES", ("host", "2", "0"): "HOST:PORT"}
VARIABLES |= {("host:1", "2", "2"): "JAX_PROCESS_ID=2"}


@pytest.mark.parametrize("variables", VARIABLES)
def test_variables_that_do_not_fit(monkeypatch, variables):
    for name, value in zip(("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"), variables, strict=True):
        if value is not None:
            monkeypatch.setenv(f"JAX_{name}", value)
    refused(VARIABLES[variables], distributed.initialise, 1, 10)


def test_alone_on_a_machine_nothing_is_joined_but_others_are_not_ignored(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("asked for others"))
    for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"):
        monkeypatch.setenv(name, "1")
    assert distributed.initialise(1, 10) is False
    monkeypatch.setattr(distributed, "_in_cluster", lambda: True)
    monkeypatch.setattr(jax.distributed, "initialize", mock.Mock(side_effect=ValueError("no coordinator_address")))
    assert distributed.initialise(9, 10) is False
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    refused("JAX_NUM_PROCESSES=2", distributed.initialise, 9, 10)


def test_metrics_on_a_full_disk_stop_the_run(files, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.Writer, "write", mock.Mock(side_effect=OSError("No space left on device")))
    run = loop.Run(rotations(files, **FIELDS), tmp_path)
    failed("step 2: .*No space left on device.*last checkpoint is kept", run.run)


CACHE_FIELDS = ("compilation_cache_dir", "persistent_cache_min_compile_time_secs", "compilation_cache_max_size")


@pytest.fixture
def cache_settings(monkeypatch):
    """jax's settings of the compile cache are restored, and JAX_COMPILATION_CACHE_DIR is not set."""
    before = {f"jax_{field}": getattr(jax.config, f"jax_{field}") for field in CACHE_FIELDS}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    yield
    for field, value in before.items():
        jax.config.update(field, value)
    compilation_cache.reset_cache()


def test_the_step_is_compiled_once_for_every_schedule_and_workdir(tmp_path, monkeypatch, cache_settings):
    """A second start, and a run of other steps, peak and warm-up in another workdir, find it in the user's cache."""
    events = []
    listen = lambda event, **_: events.append(event)  # noqa: E731
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax.monitoring.register_event_listener(listen)
    try:
        for i, fields in enumerate(({}, {}, {"steps": 37, "optim__lr": 3e-5, "optim__warmup": 0.0})):
            compiler.use_cache("auto", epath.Path(tmp_path / f"run{i}"))
            compilation_cache.reset_cache()  # Without this, jax keeps using its first folder.
            p = small.program(rotations(**fields))
            lowered = p.step(0).lower(p.abstract_state(0), p.abstract_frozen(), p.abstract_batch())
            events.clear()
            lowered.compile()
            assert f"/jax/compilation_cache/cache_{'hits' if i else 'misses'}" in events, fields
    finally:
        jax.monitoring.unregister_event_listener(listen)
    assert list((tmp_path / "cache" / "diva_jax" / "compiled").iterdir())


# config.compile_cache, the workdir, variables of the environment, and the cache; "$" is the user's folder of caches.
COMPILED = Path(__file__).with_name("compiled.json").read_text()


def test_where_compiled_programs_are_kept(tmp_path, monkeypatch, cache_settings):
    (tmp_path / "file").write_text("")
    for setting, workdir, env, kept in json.loads(COMPILED.replace("$", str(tmp_path))):
        jax.config.update("jax_compilation_cache_dir", "before")
        with monkeypatch.context() as m:
            for name, value in ({"XDG_CACHE_HOME": str(tmp_path)} | env).items():
                m.setenv(name, value)
            compiler.use_cache(setting, epath.Path(workdir))
        assert jax.config.jax_compilation_cache_dir == kept, (setting, workdir, env)


def test_a_workdir_that_the_machines_do_not_share(tmp_path, monkeypatch):
    """Process 0 has written config.json to its own folder; this process does not see it."""
    monkeypatch.setattr(workdirs, "_VISIBLE_WITHIN_S", 0.0)
    config = small.diva_config()
    workdirs.write_config(tmp_path / "first", config)
    facts = [{"config.json": workdirs.seen(tmp_path / folder / "config.json")} for folder in ("first", "second")]
    monkeypatch.setattr(distributed, "gathered", lambda _: facts)
    refused(r"config.json is \d+ for process 0 and None for process 1", distributed.check_same, facts[0])
