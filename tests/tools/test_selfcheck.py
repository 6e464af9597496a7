"""The check of a device, and what config.kernels means on a TPU by what it has found."""

import re
from types import SimpleNamespace

import commands
import jax
import jax.numpy as jnp
import pytest
from etils import epath
from helpers import abstract_mesh, refused
from jax.sharding import PartitionSpec as P

from diva_jax import config
from diva_jax.common import log
from diva_jax.models import attention, platform
from diva_jax.training import compiler, device_checks, distributed, partition
from diva_jax.training.device_checks import FAILED, OK, SLOW, UNKNOWN, Case

KERNELS = ["attention 64, 100 x 100", "feed-forward 128, 128 x 512"]
ROWS = ["machine", *KERNELS, "collectives", "checkpoint", "train step", "host"]


def test_the_command(tmp_path):
    """One table, one line for an issue, results that are kept; nothing is left in the workdir, or done twice."""
    again = ("selfcheck", f"--workdir={tmp_path}/run", "--unless_kept")
    place = {"XDG_CACHE_HOME": f"{tmp_path}/cache"}
    table, _, report = commands.succeed(*again, **place).partition("\n\nfor the report of an issue: ")
    rows = {line[:30].strip(): line[30:].split()[0] for line in table.splitlines() if line[0] != " "}
    late = {UNKNOWN} if rows["train step"] == UNKNOWN else set()  # On a machine that is very busy.
    assert list(rows) == ROWS and set(rows.values()) <= {OK, SLOW} | late
    assert all(f"{name} {verdict} (" in report for name, verdict in rows.items()) and report.count("\n") == 1
    file = re.search(r"kept in (\S+)", table)[1]
    assert file.startswith(f"{tmp_path}/cache/diva_jax/selfcheck-cpu-")
    assert list((tmp_path / "run").iterdir()) == []
    assert commands.succeed(*again, **place) == f"this device was checked before: {file}\n"


def test_a_wrong_kernel_is_found(monkeypatch):
    """A result or a gradient that is 2% off, or NaN in one image of several."""
    right, some = jax.nn.dot_product_attention, jnp.bfloat16(0.02)
    wrong = {
        "fine": right,
        "result": lambda q, k, v: right(q, k, v) * (1 + some),
        "gradient": lambda q, k, v: right(q, k, v * (1 - some) + jax.lax.stop_gradient(v * some)),
        "nan": lambda q, k, v: right(q, k, v).at[1].set(jnp.nan),
    }
    for name, kernel in wrong.items():
        monkeypatch.setattr(attention, "flash", lambda *a, interpret, kernel=kernel: kernel(*a))
        ok, said = device_checks.check_kernel(Case("attention", 8, 2, 24, 17, 2, True), True)
        assert ok == (name == "fine"), (name, said)


def test_the_kernels_of_a_program_are_found():
    """Their shapes on one device, heads and padding; a backward pass stands for its forward pass too."""
    q, k, long = (jax.ShapeDtypeStruct((8, n, 3, 64), jnp.bfloat16) for n in (4096, 77, 1024))

    def run(q, k, long):
        with platform.traced_on(abstract_mesh("tpu"), None):
            own = jax.grad(lambda x: jnp.sum(attention.attention(x, x, x).astype(jnp.float32)))(long)
            return attention.attention(q, k, k), own

    found = device_checks.cases_of(jax.make_jaxpr(jax.jit(run))(q, k, long).jaxpr)
    assert found == [Case("attention", 64, 2, 1024, 1024, 3, True), Case("attention", 64, 2, 4096, 127, 3, False)]
    assert found[0].flops == 7 * 2 * 2 * 3 * 1024**2 * 64


def test_collectives_and_checkpoint_on_eight_devices(tmp_path, monkeypatch):
    mesh = partition.make_mesh(config.MeshOptions(fsdp=2))
    ok, said = device_checks.check_collectives(mesh)
    assert ok and said.startswith("8 devices")
    ok, said = device_checks.check_checkpoint(mesh, epath.Path(tmp_path), 60)
    assert ok and said.startswith(f"8 MiB to {tmp_path}") and not list(tmp_path.iterdir())
    monkeypatch.setattr(jax.lax, "psum_scatter", lambda x, axes, **kw: x[: x.shape[0] // 8])
    assert not device_checks.check_collectives(mesh)[0]


@pytest.mark.parametrize("loss", [1.5, float("nan")])
def test_a_step_that_is_late_or_not_finite(loss):
    """With the arrays of a program that is one product."""
    mesh = partition.make_mesh(config.MeshOptions())
    arrays = {"w": jax.ShapeDtypeStruct((5, 3), jnp.bfloat16, sharding=jax.sharding.NamedSharding(mesh, P()))}
    given = dict(abstract_frozen=dict, abstract_batch=lambda: arrays, init_state=lambda arrays: arrays["w"])
    p = SimpleNamespace(arrays=arrays, stages=["only"], config=config.default("vitl14"), mesh=mesh, **given)
    step = device_checks.Step(p)
    step._step = SimpleNamespace(pace=0)
    step._compiled = step._pool.submit(
        lambda: lambda state, frozen, batch, pace: (state, {"loss": jnp.sum(state) * 0 + loss})
    )
    verdict, said, seconds = step.check(60)
    assert verdict == (OK if loss == 1.5 else FAILED) and "640 images" in said and seconds > 0
    step._compiled = device_checks.Future()
    assert step.check(0.0)[0] == UNKNOWN and not distributed.any_failed(False)


V5E, V6E = "TPU v5 lite", "TPU v6 lite"
HEADS, CHANNELS = "attention 64", "feed-forward 320"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    log.say_once.cache_clear()


def chosen(setting="auto", kind=V5E, platform="tpu", **kw):
    return compiler.chosen_kernels(setting, abstract_mesh(platform, kind=kind), **kw)


def test_auto_takes_what_has_passed_on_this_kind_of_device_a_tpu(capsys, tmp_path):
    assert chosen() == frozenset()
    assert "not checked" in (said := capsys.readouterr().out) and "diva_jax.selfcheck" in said
    compiler.keep_checked(V5E, {HEADS: True, CHANNELS: False})
    assert chosen() == chosen() == {HEADS} and chosen(kind=V6E) == frozenset()
    assert capsys.readouterr().out.count(HEADS) == 1, "one line for all programs of a process"
    compiler.keep_checked(V5E, {CHANNELS: True, "attention 72": False})
    assert chosen() == {HEADS, CHANNELS} and chosen("own") is None and chosen("xla") == frozenset()
    capsys.readouterr()
    compiler.checked_file("any").write_text("damaged")  # Without a TPU nothing is read or said.
    assert [chosen(platform=p, kind="any") for p in ("cpu", "gpu")] == [frozenset()] * 2
    assert compiler.chosen_kernels("auto", jax.sharding.AbstractMesh((1, 1), ("data", "fsdp"))) == frozenset()
    assert not capsys.readouterr().out


def test_processes_agree(monkeypatch):
    """A kernel must have passed on one of them and have failed on none."""
    others = [{}, {HEADS: True, CHANNELS: False}, {"attention 72": True}]
    monkeypatch.setattr(distributed, "gathered", lambda mine: [mine, *others])
    compiler.keep_checked(V5E, {CHANNELS: True})
    assert chosen() == {HEADS, "attention 72"}


@pytest.mark.parametrize("what", ["version", "kernel"])
def test_another_version_or_another_kernel_was_not_checked(what, monkeypatch, tmp_path):
    compiler.keep_checked(V5E, {HEADS: True})
    assert chosen()
    if what == "version":
        monkeypatch.setattr(compiler.importlib.metadata, "version", lambda package: "9")
    else:
        (tmp_path / "flash.py").write_text("changed")
        monkeypatch.setattr(compiler, "_SOURCES", tmp_path)
    assert not chosen()


def test_a_damaged_file_is_refused_with_what_to_do():
    file = compiler.keep_checked(V5E, {HEADS: True})
    for content in ("", "[]", '{"kernels": {"attention 64": 1}}', '{"kernels": ["attention 64"]}'):
        file.write_text(content)
        refused("remove it", chosen)
