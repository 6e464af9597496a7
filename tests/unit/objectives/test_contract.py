"""Tests of the interface of objectives: names, config sections, stages and sources."""

import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import small
from helpers import refused

from diva_jax import config, objectives
from diva_jax.common.errors import UserError
from diva_jax.objectives import Stage
from diva_jax.training import workdirs


def stage(name, start, end):
    return Stage(name, start, end, 1e-3, ((".*", 1.0),))


@pytest.mark.parametrize("found", [
    (), (stage("a", 1, 3),), (stage("a", 0, 3), stage("b", 4, 6)), (stage("a", 0, 3), stage("b", 2, 6)),
    (stage("a", 0, 0), stage("b", 0, 6)), (stage("a", 0, 3), stage("b", 3, 2)),
])  # fmt: skip
def test_stages_with_gaps_are_refused(found, monkeypatch):
    c = small.small_config()
    monkeypatch.setattr(objectives, "find", lambda name: SimpleNamespace(stages=lambda c: found))
    refused("stages of config.objective=diva must follow one another", objectives.stages, c)


def test_the_longest_prefix_owns_a_parameter_and_adapters_start_fresh():
    p = small.program(small.small_config())
    part = SimpleNamespace(fresh=(r"blocks/1/.*",))
    parts = {"vision": part, "vision/blocks": SimpleNamespace(fresh=()), "visual_proj/bias": SimpleNamespace(fresh=())}
    p.objective = SimpleNamespace(pretrained=lambda: parts)
    owners = workdirs.owners(p)
    assert owners["vision/blocks/1/norm1/scale"] == "vision/blocks" and owners["vision/pos_embed"] == "vision"
    assert owners["visual_proj/bias"] == "visual_proj/bias" and "visual_proj/kernel" not in owners
    del parts["vision/blocks"]
    owners = workdirs.owners(p)
    assert "vision/blocks/1/norm1/scale" not in owners and owners["vision/blocks/0/norm1/scale"] == "vision"
    parts["vison"] = part
    refused(r"pretrained\(\) has 'vison', but parameters are named like", workdirs.owners, p)


def test_an_objective_without_its_section_is_refused():
    c = small.small_config()
    with c.unlocked():
        del c.diva
    refused("config.objective=diva has no section config.diva", config.validate, c, 1)


ONE, GOOD = jnp.float32(1), {"loss": jnp.float32(1), "share": 0.5}
# What a loss returns -> what is said of it.
RETURNED = [
    (ONE, "loss returns a .*Tracer.*, and not the pair"),
    ({"loss": ONE}, "loss returns a dict, and not the pair"),
    ([ONE, GOOD], "loss returns a list"),
    ((ONE,), "a tuple of 1"),
    ((ONE, GOOD, ONE), "a tuple of 3"),
    (None, "a NoneType"),
    ((ONE, ONE), "metrics that loss returns are a .*Tracer"),
    ((ONE, {1: ONE}), "not a dict with texts as keys"),
    ((ONE, {}), r'metrics that loss returns .none. lack "loss"'),
    ((ONE, {"mse": ONE}), r'.mse. lack "loss"'),
    ((ONE, GOOD | {"lr": ONE}), "have lr, which the train step adds itself"),
    ((jnp.ones(3), GOOD), "loss is float32 .3., and not a scalar"),
    ((ONE, GOOD | {"each": jnp.ones((2, 1))}), r"metrics\['each'\] is float32 .2, 1., and not a scalar"),
    ((ONE, GOOD | {"text": "a"}), "and not a scalar"),
    ((jnp.int32(1), GOOD), "loss is int32, which has no gradient"),
]


@pytest.mark.parametrize("found, says", RETURNED)
def test_what_a_loss_returns_is_checked_when_it_is_traced(found, says):
    class Objective(objectives.Objective):
        def __init__(self, config=None, *, rngs=None):
            pass

        def loss(self, batch, keys):
            return jax.tree.map(lambda x: x + (0 * batch).astype(x.dtype) if isinstance(x, jax.Array) else x, found)

    with pytest.raises(UserError, match=rf"\A{re.escape(__file__)}:.*{says}.*return a scalar and a dict"):
        jax.eval_shape(lambda x: Objective().loss(x, None), ONE)
    with pytest.raises(UserError, match="does not define inputs, what a batch holds: see docs/WRITE_AN_OBJECTIVE.md"):
        Objective().inputs  # noqa: B018


@pytest.mark.parametrize("returned", [(jnp.float32(1), GOOD), (jnp.bfloat16(1), {"loss": 1.0, "count": jnp.int32(3)})])
def test_every_loss_of_the_contract_passes(returned):
    class Base(objectives.Objective):
        def loss(self, batch, keys):
            return returned

    class Derived(Base):
        def __init__(self):
            pass

    assert Derived().loss(None, None) is returned


@pytest.mark.parametrize("source, says", {
    "x = 1": "is not an objective: the module does not define Objective",
    "Objective = 3": "must be a subclass of diva_jax.objectives.Objective",
    "class Objective: pass": "must be a subclass of diva_jax.objectives.Objective",
    "from diva_jax import objectives as o\nclass Objective(o.Objective):\n def __init__(self): 0": "must be made as",
}.items())  # fmt: skip
def test_modules_that_are_no_objectives(source, says, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/wrong.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        refused(f"config.objective='mine.wrong'.*{says}", objectives.find, "mine.wrong")
    finally:
        for name in ("mine.wrong", "mine"):
            sys.modules.pop(name, None)
