"""Trainable tables, meshes and shardings, schedules and optimizers, and runs that are given more steps."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx
from helpers import refused
from jax.sharding import PartitionSpec as P

from diva_jax import config, objectives
from diva_jax.common.errors import UserError
from diva_jax.objectives import Stage
from diva_jax.training import checkpoint, partition, workdirs
from diva_jax.training.step import learning_rate, optimizer, pace

NAMES = ("vision/blocks/0/attn/qkv/kernel", "vision/blocks/10/norm1/scale", "visual_proj/bias", "unet/conv_in/bias")


def test_first_match_wins():
    table = ((r"vision/.*norm\d/.*", 0.0), ("vision/.*", 0.5), ("visual_proj/.*", 1.0), (".*", 0.0))
    assert partition.scales(table, NAMES) == dict(zip(NAMES, (0.5, 0.0, 1.0, 0.0), strict=True))


@pytest.mark.parametrize("table, said", [
    ((("vision/.*", 1.0),), "visual_proj/bias, unet/conv_in/bias"),
    ((("vison/.*", 1.0), (".*", 0.0)), "'vison/.*' matches no parameter"),
    (((".*", 0.0), ("vision/.*", 1.0)), "earlier patterns match all"),
    (((".*", 0.0),), "trains nothing"),
    ((("vision/(", 1.0), (".*", 0.0)), "not a regular expression"),
    ((("vision", 1.0), (".*", 0.0)), "'vision' matches no parameter"),
])  # fmt: skip
def test_wrong_tables(table, said):
    with pytest.raises(UserError, match="config.trainable") as e:
        partition.scales(table, NAMES)
    assert said in str(e.value)


def test_disassemble_and_merge_are_inverse():
    class Both(nnx.Module):
        def __init__(self):
            self.parts = nnx.List([nnx.Linear(3, 5, rngs=nnx.Rngs(i)) for i in range(2)])
            self.constant = nnx.Variable(jnp.arange(4.0))

    module = Both()
    skeleton, arrays = partition.disassemble(module)
    assert set(arrays) == {"parts/0/kernel", "parts/0/bias", "parts/1/kernel", "parts/1/bias", "constant"}
    again = skeleton.merge(
        {n: a + 1 for n, a in arrays.items() if "kernel" in n}, {n: a for n, a in arrays.items() if "kernel" not in n}
    )
    np.testing.assert_array_equal(again.parts[1].kernel[...], module.parts[1].kernel[...] + 1)
    np.testing.assert_array_equal(again.constant[...], module.constant[...])


def mesh_config(**fields):
    c = config.default().mesh
    c.update(fields)
    return c


@pytest.mark.parametrize(
    "fields, shape", [({}, (8, 1)), ({"fsdp": 4}, (2, 4)), ({"data": 1, "fsdp": 8}, (1, 8)), ({"data": 8}, (8, 1))]
)
def test_mesh_covers_all_devices(fields, shape):
    mesh = partition.make_mesh(mesh_config(**fields))
    assert tuple(mesh.shape.items()) == (("data", shape[0]), ("fsdp", shape[1]))


@pytest.mark.parametrize(
    "fields, said",
    [({"fsdp": 3}, "does not divide the 8 devices"), ({"data": 4}, "this run has 8"), ({"fsdp": 0}, "0")],
)
def test_mesh_that_does_not_divide(fields, said):
    refused(said, lambda: partition.make_mesh(mesh_config(**fields)))


@pytest.mark.parametrize("shape, spec", [
    ((6, 8), P(None, "fsdp")), ((12, 8), P("fsdp", None)), ((3, 3, 5, 20), P(None, None, None, "fsdp")),
    ((7, 9), P()),  # No axis divides.
    ((2, 4), P()),  # Too small.
    ((), P()),
])  # fmt: skip
def test_the_largest_axis_that_divides_is_split(shape, spec):
    assert partition.parameter_spec(shape, 4, 30) == spec
    assert partition.parameter_spec(shape, 1, 0) == P()


def test_optimizer_state_lies_as_its_parameters_and_bytes_per_device_fall():
    c = small.small_config(mesh__fsdp=8, mesh__min_shard=64)
    p = small.program(c, 8)
    state = p.abstract_state(0)
    leaves = jax.tree_util.tree_leaves_with_path(state["opt"])
    split = 0
    for path, leaf in leaves:
        key = getattr(path[-1], "key", None)
        if leaf.ndim and key in p.shardings:
            assert leaf.sharding == p.shardings[key], path
            split += "fsdp" in leaf.sharding.spec
    assert split > 10

    def held(a):
        return np.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize

    whole = sum(a.size * a.dtype.itemsize for a in p.arrays.values())
    assert sum(held(a) for a in p.arrays.values()) < whole / 3


STAGE = Stage("tune", 100, 4700, 1e-4, ())


def rate(stage: Stage, warmup: float):
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
    lr = rate(STAGE._replace(rate=lambda step, pace: pace.warm + step), 0.5)
    assert (lr(0), lr(3)) == (2300, 2303)


def one_update(params, grads, **fields):
    c = config.default().optim.unlock()
    c.update(fields)
    tx = optimizer(c, rate(Stage("s", 0, 10, 0.5, ()), c.warmup), dict.fromkeys(params, 1.0))
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


@pytest.mark.parametrize("field, value", [("name", "lion"), ("no_decay", "(")])
def test_what_is_no_optimizer_is_refused(field, value):
    c = config.default()
    c.optim[field] = value
    refused(f"config.optim.{field}=", config.validate, c, 1)


def of_steps(**fields):
    return small.small_config(**{"steps": 10, "condition__warmup_steps": 3} | fields)


@pytest.fixture(scope="module")
def programs():
    """Of ten steps, and of 25."""
    return small.program(of_steps()), small.program(of_steps(steps=25))


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A workdir of `config()` whose last checkpoint is that of its last step."""
    workdirs.write_config(tmp_path, of_steps())
    monkeypatch.setattr(checkpoint, "latest_step", lambda _: 13)
    return tmp_path


def test_more_steps_and_nothing_else_extend_a_run(workdir):
    assert workdirs.check_config(workdir, of_steps()) is None
    assert workdirs.check_config(workdir, of_steps(steps=25)) == 10
    assert workdirs.check_config(workdir, of_steps(steps=25, log__every=3, data__threads=2, checkpoint__keep=9)) == 10
    refused(r"steps \(10 there, 9 here\)", lambda: workdirs.check_config(workdir, of_steps(steps=9)))
    with pytest.raises(UserError, match=r"another config: diva.draws \(.*\), optim.lr \(0.01 there, 0.5 here\); use"):
        workdirs.check_config(workdir, of_steps(steps=25, optim__lr=0.5, diva__draws=3))


@pytest.mark.parametrize("start", [2, 8, 13])
def test_what_becomes_of_the_learning_rate(programs, start):
    """Both rates are of the same step: before the last stage of its first one, after the end of its last one."""
    short, long = programs
    said = workdirs.extension(long, start, 10)
    assert "config.steps was 10 and is 25: the stage tune has the schedule of its 25 steps" in said
    now, before = (float(n) for n in re.findall(r"is ([\d.e-]+), where that of 10 steps has ([\d.e-]+)", said)[0])
    stage = max(start, 3) - 3
    assert now == pytest.approx(float(rate(long.stages[1], long.config.optim.warmup)(stage)), rel=1e-2)
    assert before == pytest.approx(float(rate(short.stages[1], short.config.optim.warmup)(min(stage, 9))), rel=1e-2)
    assert workdirs.extension(long, start, 25) == ""


def test_the_optimizer_state_does_not_depend_on_the_schedule(programs):
    """Checkpoints of any number of steps are of the same form."""
    shapes = [p.abstract_state(1) for p in programs]
    assert shapes[0] == shapes[1]
    numbers = [pace(p.stages[1], 0.2) for p in programs]
    assert [int(n.warm) for n in numbers] == [2, 5]
