"""Trainable tables, meshes, schedules and optimizers, runs that are given more steps; rows and progress of a run."""

import contextlib
import gc
import io
import itertools
import json
import math
import re
import sys
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from helpers import failed, refused, rows
from tqdm import tqdm

from diva_jax import config, objectives
from diva_jax.common import log
from diva_jax.objectives import contract
from diva_jax.training import checkpoint, metrics, partition, workdirs
from diva_jax.training.step import learning_rate, optimizer, pace

NAMES = ("vision/blocks/0/attn/qkv/kernel", "vision/blocks/10/norm1/scale", "visual_proj/bias", "unet/conv_in/bias")


def test_the_first_match_wins_and_wrong_tables_are_refused():
    table = ((r"vision/.*norm\d/.*", 0.0), ("vision/.*", 0.5), ("visual_proj/.*", 1.0), (".*", 0.0))
    assert partition.scales(table, NAMES) == dict(zip(NAMES, (0.5, 0.0, 1.0, 0.0), strict=True))
    for table, said in json.loads(Path(__file__).with_name("trainable.json").read_text()):
        assert said in refused("config.trainable", partition.scales, table, NAMES)


def test_a_mesh_covers_all_devices_or_is_refused():
    for fields, want in (
        ({}, (8, 1)), ({"fsdp": 4}, (2, 4)), ({"data": 1, "fsdp": 8}, (1, 8)), ({"data": 8}, (8, 1)),
        ({"fsdp": 3}, "does not divide the 8 devices"), ({"data": 4}, "this run has 8"), ({"fsdp": 0}, "0"),
    ):  # fmt: skip
        c = config.default().mesh
        c.update(fields)
        if isinstance(want, str):
            refused(want, partition.make_mesh, c)
        else:
            assert tuple(partition.make_mesh(c).shape.items()) == (("data", want[0]), ("fsdp", want[1]))


def test_optimizer_state_lies_as_its_parameters_and_bytes_per_device_fall():
    p, split = small.program(small.diva_config(mesh__fsdp=8, mesh__min_shard=64), 8), 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(p.abstract_state(0)["opt"]):
        key = getattr(path[-1], "key", None)
        if leaf.ndim and key in p.shardings:
            assert leaf.sharding == p.shardings[key], path
            split += "fsdp" in leaf.sharding.spec
    assert split > 10
    shapes = [(a.sharding.shard_shape(a.shape), a.dtype.itemsize) for a in p.arrays.values()]
    whole = sum(a.size * a.dtype.itemsize for a in p.arrays.values())
    assert sum(np.prod(shape) * size for shape, size in shapes) < whole / 3


STAGE = objectives.Stage("tune", 100, 4700, 1e-4, ())


def rate(stage: objectives.Stage, warmup: float):
    return learning_rate(stage, pace(stage, warmup))


def cosine(step: int, warm: int) -> float:
    return 0.5e-4 * (1 + math.cos(math.pi * (step - warm) / (4600 - warm)))


# The published schedule has ceil(0.005 * 4600) = 23 steps of warm-up from 0; -1 stands for the share.
@pytest.mark.parametrize("fields, values", [
    ({}, {0: 0.0, 11: 1e-4 * 11 / 23, 23: 1e-4, **{s: cosine(s, 23) for s in (24, 1000, 4599)}, 4600: 0.0}),
    (dict(warmup_steps=46), {23: 0.5e-4, 46: 1e-4, 4599: cosine(4599, 46)}),
    (dict(warmup_steps=0), {0: 1e-4}),
    (dict(schedule="constant", warmup_steps=10), {0: 0.0, 3: 0.3e-4, 10: 1e-4, 4599: 1e-4}),
    (dict(schedule="constant", warmup_steps=0), {0: 1e-4, 4599: 1e-4}),
    (dict(schedule="constant", warmup_steps=-1), {11: 1e-4 * 11 / 23, 23: 1e-4}),
])  # fmt: skip
def test_learning_rate_is_linear_then_cosine_to_zero_or_constant(fields, values):
    lr = rate(STAGE._replace(**fields), 0.005)
    for step, value in values.items():
        np.testing.assert_allclose(lr(step), value, rtol=1e-5, atol=1e-12)


def test_stages_have_the_schedule_of_the_config_where_they_give_none():
    c = config.default()
    c.optim.update(schedule="constant", warmup_steps=7)
    c.condition.warmup_steps = 3
    assert {(s.schedule, s.warmup_steps) for s in objectives.stages(c)} == {("constant", 7)}
    own = config.default(objective="kuea")
    own.optim.update(schedule="constant", warmup_steps=7)
    lr = rate(*objectives.stages(own), 0.5)
    np.testing.assert_allclose([lr(2), lr(6), lr(39_999)], np.array([3 / 7, 1, 1]) * own.optim.lr, rtol=1e-6)
    c.optim.schedule = "linear"
    refused("config.optim.schedule='linear' must be cosine or constant", config.validate, c, 1)
    own = rate(STAGE._replace(rate=lambda step, pace: pace.warm + step), 0.5)
    assert (own(0), own(3)) == (2300, 2303)
    for steps in (1, 2, 3):  # The shortest stages have a schedule.
        assert max(float(rate(objectives.Stage("s", 0, steps, 0.5, ()), 0.9)(i)) for i in range(steps)) == 0.5


@pytest.mark.parametrize("name, every", [*itertools.product(("sgd", "adamw"), (False, True))])
def test_weight_decay_spares_biases_norms_and_those_named(name, every):
    """tests/parity/test_torch_training.py has the clipping of the global norm."""
    params = {n: jnp.full((2, 2)[: 1 + (n == "net/kernel")], 2.0) for n in ("net/kernel", "net/scale", "scale")}
    c = config.default().optim.unlock()
    c.update(name=name, warmup=0.0, clip=0.0, weight_decay=0.1, decay_all=every, no_decay="scale")
    tx = optimizer(c, rate(objectives.Stage("s", 0, 10, 0.5, ()), 0.0), dict.fromkeys(params, 1.0))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    decaying = {"net/kernel"} | ({"net/scale"} if every else set())
    for n in params:
        np.testing.assert_allclose(updates[n], -0.5 * 0.1 * 2 if n in decaying else 0.0, rtol=1e-6)


def of_steps(**fields):
    return small.diva_config(**{"steps": 10, "condition__warmup_steps": 3} | fields)


def test_more_steps_and_nothing_else_extend_a_run(tmp_path, monkeypatch):
    workdirs.write_config(tmp_path, of_steps())
    monkeypatch.setattr(checkpoint, "latest_step", lambda _: 13)
    assert workdirs.check_config(tmp_path, of_steps()) is None
    assert workdirs.check_config(tmp_path, of_steps(steps=25)) == 10
    assert workdirs.check_config(tmp_path, of_steps(steps=25, data__max_broken_share=0.5, checkpoint__keep=9)) == 10
    refused(r"steps \(10 there, 9 here\)", lambda: workdirs.check_config(tmp_path, of_steps(steps=9)))
    other = of_steps(steps=25, optim__lr=0.5, diva__draws=3)
    says = r"another config: diva.draws \(.*\), optim.lr \(0.01 there, 0.5 here\); use"
    refused(says, workdirs.check_config, tmp_path, other)


def test_what_becomes_of_the_learning_rate():
    """Both rates are of the same step: before the last stage of its first one, after the end of its last one."""
    short, long = (small.program(of_steps(**fields)) for fields in ({}, {"steps": 25}))
    for start in (2, 8, 13):
        said = workdirs.extension(long, start, 10)
        assert "config.steps was 10 and is 25: the stage tune has the schedule of its 25 steps" in said
        now, before = (float(n) for n in re.findall(r"is ([\d.e-]+), where that of 10 steps has ([\d.e-]+)", said)[0])
        stage = max(start, 3) - 3
        for p, step, found in ((long, stage, now), (short, min(stage, 9), before)):
            assert found == pytest.approx(float(rate(p.stages[1], p.config.optim.warmup)(step)), rel=1e-2)
        assert workdirs.extension(long, start, 25) == ""


def values(loss, grad=1.0):
    return {"loss": np.float32(loss), "grad_norm": np.float32(grad), "lr": np.float32(0.1)}


def test_rows_are_means_over_their_window(tmp_path, capsys):
    with contextlib.closing(metrics.Writer(tmp_path, 0, tensorboard=True)) as writer:
        progress = metrics.Progress(writer, 0, 5, every=2, images=4, utilisation={2: 1e-3, 4: 2e-3}.get)
        for step, loss in enumerate([1.0, 2.0, 3.0, 5.0, 7.0], 1):
            progress.add(step, values(loss))
        progress.flush()
    assert [(r["step"], r["loss"]) for r in rows(tmp_path)] == [(2, 1.5), (4, 4.0), (5, 7.0)]
    shares = [r["mfu"] / r["images_per_s"] for r in rows(tmp_path) if "mfu" in r]
    assert shares == pytest.approx([1e-3, 2e-3])  # Of another stage; nothing is known of the last step.
    assert all(row.keys() - {"loss"} <= contract._OWN_METRICS for row in rows(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].startswith("step 4/5  loss 4.0000") and "MFU" in lines[1]
    assert list((tmp_path / "tensorboard").iterdir())


def test_not_finite_names_step_and_quantity(tmp_path):
    for bad, named in ((values(np.nan), "loss"), (values(1.0, np.inf), "grad_norm")):
        progress = metrics.Progress(None, 0, 9, every=1, images=1)
        progress.add(7, bad)
        failed(f"step 7: {named} not finite.*: start another --workdir with", progress.flush)


def test_sessions_are_listed_and_rows_have_their_time(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    for begins in (0, 2):
        with contextlib.closing(metrics.Writer(tmp_path, begins, tensorboard=False)) as writer:
            for step in (begins + 1, begins + 2):
                clock[0] += 7.5
                writer.write(step, {"loss": 1.0})
        clock[0] += 1000
    assert [(r["step"], r["seconds"]) for r in rows(tmp_path)] == [(1, 7.5), (2, 15.0), (3, 7.5), (4, 15.0)]
    sessions = json.loads((tmp_path / "sessions.json").read_text())
    assert [s["step"] for s in sessions] == [0, 2] and sessions[0]["started"].endswith("+00:00")
    assert all(s["devices"] == "8 x cpu" and {"diva_jax", "jax", "python"} <= set(s["versions"]) for s in sessions)


Terminal = type("Terminal", (io.StringIO,), {"encoding": "utf-8", "isatty": lambda self: True})


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch, capsys):
    with log.progress("runs", 2, every=0.0), log.progress("counting", 4, "items", every=0.0) as bar:
        bar.update(3)
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("counting: 3/4 items, ") and "\x1b" not in out
    with log.progress("counting", 4, "items", every=3600.0) as bar:
        bar.update(3)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    with log.progress("counting", 4, "items") as bar:
        log.say("a message")
        bar.update(3)
    assert "counting:   0%" in terminal.getvalue() and "a message\n" in terminal.getvalue()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert log.progress("counting", 4).disable
    told = []
    with log.waiting("compiling", told.append, every=0.01):
        while len(told) < 2:
            time.sleep(0.01)
    count = len(told)
    time.sleep(0.05)
    assert len(told) == count and told[0] == "compiling: 0 min so far"


def test_a_message_while_bars_of_libraries_are_collected(monkeypatch, request):
    monkeypatch.setattr(sys, "stdout", type("Collecting", (Terminal,), {"__eq__": lambda *_: gc.collect() < 0})())
    request.addfinalizer(gc.enable)
    gc.disable()
    for _ in range(6):
        bar = tqdm(total=3, file=io.StringIO())
        bar.itself = bar  # Only the collector frees it.
    log.say("a message")
    assert "a message\n" in sys.stdout.getvalue()


def test_wandb_gets_the_same_rows_and_one_run_per_workdir(tmp_path, monkeypatch):
    wandb = mock.MagicMock()
    wandb.init.return_value = wandb
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for step in (0, 2):
        writer = metrics.Writer(tmp_path / "a", step, tensorboard=False, wandb="mine", config={"steps": 9})
        writer.write(step + 1, {"loss": 1.0 + step})
        writer.close()
    metrics.Writer(tmp_path / "b", 0, tensorboard=False, wandb="mine").close()
    assert wandb.log.call_args_list == [mock.call({"loss": 1.0}, step=1), mock.call({"loss": 3.0}, step=3)]
    assert wandb.finish.call_count == 3
    first, again, other = (call.kwargs for call in wandb.init.call_args_list)
    assert first == again and first["id"] != other["id"] and first["project"] == "mine" and first["resume"] == "allow"
    assert first["config"] == {"steps": 9} and first["name"] == "a"
    wandb.init.side_effect = ZeroDivisionError
    refused("config.log.wandb='mine'.*WANDB_MODE=offline", metrics.Writer, tmp_path, 0, tensorboard=False, wandb="mine")


@pytest.mark.attack
@pytest.mark.parametrize("seed", range(6))
def test_lines_that_are_no_rows_are_removed_with_a_message(tmp_path, capsys, seed):
    """Whatever stands in the log of a run that resumes: rows up to its step are kept, and what follows is appended."""
    rng = np.random.default_rng(seed)
    good = [json.dumps({"step": i, "loss": 0.5}).encode() for i in range(1, 7)]
    odd = [b"", b"[]", b"3", b"null", b'"step"', b"{}", b'{"step": "2"}', b'{"step": true}', b'{"step": NaN}', b"\xff"]
    odd += [b"{" * 100_000, b'{"step": 1, "loss', b"\x00", b'{"step": [1]}']
    lines = list(good)
    for line in (added := [odd[i] for i in rng.integers(len(odd), size=3)]):
        lines.insert(int(rng.integers(len(lines))), line)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    with contextlib.closing(metrics.Writer(tmp_path, 4, tensorboard=False)) as writer:
        writer.write(5, {"loss": 1.0})
    assert [(r["step"], r["loss"]) for r in rows(tmp_path)] == [(i, 0.5) for i in (1, 2, 3, 4)] + [(5, 1.0)]
    assert f"{len(added)} lines that are no rows of a log are removed" in capsys.readouterr().out
