"""The train step: trained and frozen parameters, and independence of devices and micro-batches."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from diva_jax import config
from diva_jax.training import partition, step


class Result(NamedTuple):
    """A short run.

    Attributes:
      losses: one per step.
      state: the final train state.
      frozen: name -> array that no stage trains.
      before: name -> initial value of every parameter, numpy.
      program: the program.
      seen: step -> parameters after it, numpy.
    """

    losses: list[float]
    state: dict
    frozen: dict
    before: dict
    program: step.Program


def run(c, steps: int, devices: int = 1) -> Result:
    """Trains for `steps` steps of one stage on random weights and images."""
    p = small.program(c, devices)
    arrays = small.random_arrays(p)
    state = p.init_state({n: jnp.copy(arrays[n]) for n in p.trained})
    frozen = {n: arrays[n] for n in p.abstract_frozen()}
    before = {n: np.asarray(a) for n, a in arrays.items()}
    losses, fn = [], p.step(0)
    for i in range(steps):
        state, metrics = fn(state, frozen, small.batch(p, i))
        losses.append(float(metrics["loss"]))
    return Result(losses, state, frozen, before, p)


@pytest.fixture(scope="module")
def reference():
    """Twenty steps on one device, in which the step is traced once."""
    chex.clear_trace_counter()
    with pytest.MonkeyPatch.context() as patch, jax.default_matmul_precision("highest"):
        patch.setattr(step, "train_step", chex.assert_max_traces(step.train_step, n=1))
        return run(small.small_config(steps=20), 20)


def test_twenty_steps_leave_frozen_leaves_bit_identical_and_trace_once(reference):
    losses, state, frozen, before, *_ = reference
    for name, array in frozen.items():
        np.testing.assert_array_equal(np.asarray(array), before[name], err_msg=name)
    for name, array in state["params"].items():
        assert not np.array_equal(np.asarray(array), before[name]), f"{name} was not trained"
    assert set(state["params"]) | set(frozen) == set(before)
    assert {n.split("/")[0] for n in frozen} == {"unet", "vae", "text_context"}
    assert losses[-1] < losses[0]


def test_optimizer_state_has_only_trained_parameters():
    c = small.small_config(trainable=(("vision/blocks/1/.*", 1.0), ("visual_proj/.*", 0.5), (".*", 0.0)))
    p = small.program(c)
    state = p.abstract_state(0)
    names = {
        path[-1].key
        for path, leaf in jax.tree_util.tree_flatten_with_path(state["opt"])[0]
        if isinstance(path[-1], jax.tree_util.DictKey)
    }
    assert names == set(p.trained) == set(state["params"])
    assert all(n.startswith(("vision/blocks/1/", "visual_proj/")) for n in names)


@pytest.mark.parametrize(
    "devices, accum, fsdp, shard_frozen",
    [(2, 4, 1, True), (8, 1, 4, True), (8, 1, 4, False)],
)
def test_losses_do_not_depend_on_devices_or_accumulation(reference, devices, accum, fsdp, shard_frozen):
    mesh = dict(mesh__fsdp=fsdp, mesh__shard_frozen=shard_frozen, mesh__min_shard=64)
    found = run(small.small_config(steps=20, accum=accum, **mesh), 4, devices)
    np.testing.assert_allclose(found.losses, reference.losses[:4], rtol=1e-5)
    assert any("fsdp" in a.sharding.spec for a in found.state["params"].values()) == (fsdp > 1)
    specs = [found.program.arrays[n].sharding.spec for n in found.frozen]
    assert any("fsdp" in spec for spec in specs) == (fsdp > 1 and shard_frozen)


def test_learning_rate_scale_of_the_table_scales_the_update():
    def moved(scale):
        table = (("visual_proj/.*", scale), (".*", 0.0))
        c = small.small_config(
            trainable=table, optim__name="sgd", optim__momentum=0.0, optim__warmup=0.0, optim__lr=1.0
        )
        found = run(c, 1)
        return np.asarray(found.state["params"]["visual_proj/kernel"]) - found.before["visual_proj/kernel"]

    np.testing.assert_allclose(moved(0.25), 0.25 * moved(1.0), rtol=1e-3, atol=1e-7)


def test_faithful_draws_weigh_as_the_authors_backward_passes():
    """sum_a (g[a, first] + g[a, last] / A): the first draw is not divided by the number of micro-batches."""
    c = config.faithful(small.small_config(accum=4))
    p = small.program(c)
    module = p.skeleton.merge(small.random_arrays(p))
    np.testing.assert_array_equal(module.weights() / c.accum, [1.0, 1.0 / c.accum])
    c.diva.draw_weights = "exact"
    module = small.program(c).skeleton.merge(small.random_arrays(p))
    np.testing.assert_array_equal(module.weights(), [0.5, 0.5])


def test_same_image_same_draws_whatever_its_micro_batch():
    """Random numbers depend on rows and steps, not on positions in a micro-batch."""

    key = jax.random.key_data(jax.random.key(3))
    rows = jnp.arange(6)
    keys = step.image_keys(key, jnp.int32(5), rows)
    shuffled = step.image_keys(key, jnp.int32(5), rows[::-1])
    assert (jax.random.key_data(keys)[::-1] == jax.random.key_data(shuffled)).all()
    assert len({tuple(k) for k in np.asarray(jax.random.key_data(keys)).tolist()}) == 6
    assert not (jax.random.key_data(step.image_keys(key, jnp.int32(6), rows)) == jax.random.key_data(keys)).all()


def test_remat_does_not_change_losses(reference):
    remat = run(small.small_config(steps=20, remat="all"), 2)
    np.testing.assert_allclose(reference.losses[:2], remat.losses, rtol=1e-6)


def test_summary_counts_every_parameter():
    p = small.program(small.small_config())
    text = partition.summary(p.arrays, p.trained)
    total = sum(a.size for a in p.arrays.values())
    trained = sum(p.arrays[n].size for n in p.trained)
    last = text.splitlines()[-1].replace(",", "").split()
    assert last[:3] == ["total", str(trained), str(total - trained)]
