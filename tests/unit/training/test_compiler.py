"""Tests of the options of the TPU compiler: their form, where they are passed, and the compiler's refusal."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import small
from helpers import refused

from diva_jax import config
from diva_jax.costs import chips
from diva_jax.training import compiler, sharding, step


@pytest.mark.parametrize("chip", chips.CHIPS.values(), ids=list(chips.CHIPS))
def test_auto_is_the_row_of_the_chip(chip, monkeypatch):
    device = SimpleNamespace(platform="tpu", device_kind=chip.kind)
    assert compiler.options("auto", device) == dict(chip.compiler_options)
    row = dataclasses.replace(chip, compiler_options=(("a", "1"),))
    monkeypatch.setattr(chips, "CHIPS", {"one": row})
    assert compiler.options("auto", device) == {"a": "1"}
    assert compiler.options("b=2", device) == {"b": "2"}
    assert compiler.options("", device) == {}


def test_other_devices_have_none():
    """A TPU without a row has an empty set of options; for CPUs and GPUs there is none."""
    assert compiler.options("auto", SimpleNamespace(platform="tpu", device_kind="TPU v99")) == {}
    for setting in ("auto", "", "xla_tpu_rwb_fusion=false"):
        for platform in ("cpu", "gpu"):
            assert compiler.options(setting, SimpleNamespace(platform=platform, device_kind="any")) is None


def test_the_form_of_options():
    assert compiler.parse("") == {}
    assert compiler.parse("a=1, b=false") == {"a": "1", "b": "false"}
    for bad in ("a", "a=", "=1", "a=1,", "a=1=2", "a=1,a=2", ","):
        c = small.small_config()
        c.compiler_options = bad
        refused("config.compiler_options=.*NAME=VALUE", config.validate, c, 1)


def test_the_step_is_jitted_with_them(monkeypatch):
    c = small.small_config()
    c.compiler_options = "a=1"
    program = step.Program(c, sharding.make_mesh(c.mesh))
    given = []
    monkeypatch.setattr(compiler, "options", lambda setting, device: given.append((setting, device)) or {"b": "2"})
    monkeypatch.setattr(step.jax, "jit", lambda fn, **kw: kw)
    assert program.step(0).jitted["compiler_options"] == {"b": "2"}
    assert given == [("a=1", program.mesh.devices.flat[0])]


def test_what_the_compiler_refuses_is_one_sentence():
    lowered = jax.jit(lambda x: x + 1, compiler_options={"nonsense": "1"}).lower(jnp.zeros(2))
    refused("does not accept nonsense", compiler.compiled, lowered)
    fine = compiler.compiled(jax.jit(lambda x: x + 1).lower(jnp.zeros(2)))
    assert fine(jnp.zeros(2)).tolist() == [1, 1]
