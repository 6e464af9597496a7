"""The train step: what it trains, what it leaves alone, and that devices and micro-batches do not matter."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from diva_jax import config
from diva_jax.training import partition, step


def run(c, steps: int, devices: int = 1):
    """(losses, final state, frozen arrays, all initial values as numpy, the program)."""
    p = small.program(c, devices)
    arrays = small.random_arrays(p)
    state = p.init_state({n: jnp.copy(arrays[n]) for n in p.trained})
    frozen = {n: arrays[n] for n in p.abstract_frozen()}
    before = {n: np.asarray(a) for n, a in arrays.items()}
    losses, fns = [], {}
    for i in range(steps):
        stage = p.stage_at(i)
        fns.setdefault(stage, p.step(stage))
        state, metrics = fns[stage](state, frozen, small.batch(p, i))
        losses.append(float(metrics["loss"]))
        if i + 1 == p.stages[stage].end and stage + 1 < len(p.stages):
            state["opt"] = p.init_opt(stage + 1, state["params"])
    return losses, state, frozen, before, p


def test_twenty_steps_leave_frozen_leaves_bit_identical_and_trace_once(monkeypatch):
    chex.clear_trace_counter()
    monkeypatch.setattr(step, "train_step", chex.assert_max_traces(step.train_step, n=1))
    c = small.small_config(steps=20)
    losses, state, frozen, before, p = run(c, 20)
    for name, array in frozen.items():
        np.testing.assert_array_equal(np.asarray(array), before[name], err_msg=name)
    for name, array in state["params"].items():
        assert not np.array_equal(np.asarray(array), before[name]), f"{name} was not trained"
    assert set(state["params"]) | set(frozen) == set(before)
    assert {n.split("/")[0] for n in frozen} == {"unet", "vae", "text_context"}
    assert losses[-1] < losses[0]


def test_optimizer_state_holds_only_what_is_trained():
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


@pytest.fixture(scope="module")
def reference():
    return run(small.small_config(), 10)


@pytest.mark.parametrize(
    "devices, accum, fsdp, shard_frozen",
    [(1, 4, 1, True), (2, 1, 1, True), (8, 1, 1, True), (2, 4, 1, True), (8, 1, 4, True), (8, 1, 4, False)],
)
def test_losses_do_not_depend_on_devices_or_accumulation(reference, devices, accum, fsdp, shard_frozen):
    c = small.small_config(accum=accum, mesh__fsdp=fsdp, mesh__shard_frozen=shard_frozen, mesh__min_shard=64)
    losses, state, frozen, _, p = run(c, 10, devices)
    np.testing.assert_allclose(losses, reference[0], rtol=1e-5)
    assert any("fsdp" in a.sharding.spec for a in state["params"].values()) == (fsdp > 1)
    lies = [p.arrays[n].sharding.spec for n in frozen]
    assert any("fsdp" in spec for spec in lies) == (fsdp > 1 and shard_frozen)


def test_warm_up_stage_trains_the_projection_alone_then_everything():
    c = small.small_config(steps=3, condition__warmup_steps=2, optim__warmup=0.0)
    _, two, _, before, p = run(c, 2)
    assert [s.name for s in p.stages] == ["visual_proj", "tune"]
    moved = {n for n, a in two["params"].items() if not np.array_equal(np.asarray(a), before[n])}
    assert moved == {"visual_proj/kernel", "visual_proj/bias"}
    _, five, _, before, p = run(c, 5)
    assert all(not np.array_equal(np.asarray(a), before[n]) for n, a in five["params"].items())
    assert int(five["step"]) == 5


def test_learning_rate_scale_of_the_table_scales_the_update():
    def moved(scale):
        table = (("visual_proj/.*", scale), ("vision/.*", 1.0), (".*", 0.0))
        c = small.small_config(
            trainable=table, optim__name="sgd", optim__momentum=0.0, optim__warmup=0.0, optim__lr=1.0
        )
        _, state, _, before, _ = run(c, 1)
        return np.asarray(state["params"]["visual_proj/kernel"]) - before["visual_proj/kernel"]

    np.testing.assert_allclose(moved(0.25), 0.25 * moved(1.0), rtol=1e-3, atol=1e-7)


def test_faithful_draws_weigh_as_the_authors_backward_passes():
    """sum_a (g[a, first] + g[a, last] / A): the first draw escapes the division by the micro-batches."""
    c = config.faithful(small.small_config(accum=4))
    p = small.program(c)
    module = p.skeleton.merge(small.random_arrays(p))
    np.testing.assert_array_equal(module.weights() / c.accum, [1.0, 1.0 / c.accum])
    c.diva.draw_weights = "exact"
    module = small.program(c).skeleton.merge(small.random_arrays(p))
    np.testing.assert_array_equal(module.weights(), [0.5, 0.5])


def test_same_image_same_draws_whatever_its_micro_batch():
    """Rows, not positions in a micro-batch, decide the random numbers; rows and steps differ."""

    key = jax.random.key_data(jax.random.key(3))
    rows = jnp.arange(6)
    keys = step.image_keys(key, jnp.int32(5), rows)
    shuffled = step.image_keys(key, jnp.int32(5), rows[::-1])
    assert (jax.random.key_data(keys)[::-1] == jax.random.key_data(shuffled)).all()
    assert len({tuple(k) for k in np.asarray(jax.random.key_data(keys)).tolist()}) == 6
    assert not (jax.random.key_data(step.image_keys(key, jnp.int32(6), rows)) == jax.random.key_data(keys)).all()


def test_remat_changes_nothing():
    plain, _, _, _, _ = run(small.small_config(), 2)
    remat, _, _, _, _ = run(small.small_config(remat="all"), 2)
    np.testing.assert_allclose(plain, remat, rtol=1e-6)


def test_summary_counts_every_parameter():
    p = small.program(small.small_config())
    text = partition.summary(p.arrays, p.trained)
    total = sum(a.size for a in p.arrays.values())
    trained = sum(p.arrays[n].size for n in p.trained)
    last = text.splitlines()[-1].replace(",", "").split()
    assert last[:3] == ["total", str(trained), str(total - trained)]
