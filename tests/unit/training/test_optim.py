"""Schedules and chains against values computed by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refused

from diva_jax import config, objectives
from diva_jax.objectives import Stage
from diva_jax.training import optim

STAGE = Stage("tune", 100, 4700, 1e-4, ())


def rate(stage: Stage, warmup: float):
    return optim.learning_rate(stage, optim.pace(stage, warmup))


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


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_stages_have_a_schedule(steps):
    lr = rate(Stage("s", 0, steps, 0.5, ()), 0.9)
    assert max(float(lr(i)) for i in range(steps)) == 0.5


def test_stages_have_the_schedule_of_the_config_where_they_give_none():
    c = config.default()
    c.optim.update(schedule="constant", warmup_steps=7)
    c.condition.warmup_steps = 3
    assert {(s.schedule, s.warmup_steps) for s in objectives.stages(c)} == {("constant", 7)}
    c.optim.schedule = "linear"
    refused("config.optim.schedule='linear' must be cosine or constant", config.validate, c, 1)


def one_update(params, grads, **fields):
    c = config.default().optim.unlock()
    c.update(fields)
    tx = optim.optimizer(c, rate(Stage("s", 0, 10, 0.5, ()), c.warmup), dict.fromkeys(params, 1.0))
    updates, _ = tx.update(grads, tx.init(params), params)
    return updates


def test_clip_is_of_the_global_norm_and_comes_first():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones(3)}
    grads = {"a": jnp.full((2, 2), 3.0), "b": jnp.full(3, 4.0)}
    norm = math.sqrt(4 * 9 + 3 * 16)
    updates = one_update(params, grads, name="sgd", warmup=0.0, clip=1.0)
    np.testing.assert_allclose(updates["a"], -0.5 * 3 / norm, rtol=1e-6)
    np.testing.assert_allclose(updates["b"], -0.5 * 4 / norm, rtol=1e-6)
    unclipped = one_update(params, grads, name="sgd", warmup=0.0, clip=0.0)
    np.testing.assert_allclose(unclipped["b"], -2.0, rtol=1e-6)


@pytest.mark.parametrize("decay_all", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weight_decay_spares_biases_and_norms_or_those_named_alone(name, decay_all):
    params = {"net/kernel": jnp.full((2, 2), 2.0), **{n: jnp.full(3, 2.0) for n in ("net/scale", "scale")}}
    decaying = {"net/kernel"} | ({"net/scale"} if decay_all else set())
    fields = dict(name=name, warmup=0.0, clip=0.0, weight_decay=0.1, decay_all=decay_all, no_decay="scale")
    updates = one_update(params, {n: jnp.zeros_like(a) for n, a in params.items()}, **fields)
    for n in params:
        np.testing.assert_allclose(updates[n], -0.5 * 0.1 * 2 if n in decaying else 0.0, rtol=1e-6)


def test_a_stage_may_have_a_rate_of_its_own():
    lr = rate(STAGE._replace(rate=lambda step, pace: pace.warm + step), 0.5)
    assert (lr(0), lr(3)) == (2300, 2303)


@pytest.mark.parametrize("field, value", [("name", "lion"), ("no_decay", "(")])
def test_what_is_no_optimizer_is_refused(field, value):
    c = config.default()
    c.optim[field] = value
    refused(f"config.optim.{field}=", config.validate, c, 1)
