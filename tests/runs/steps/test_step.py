"""The train step: trained and frozen parameters, and independence of devices and micro-batches."""

import chex
import jax
import numpy as np
import pytest
import small

from diva_jax.training import step


@pytest.fixture(scope="module")
def reference():
    """Twenty steps on one device, in which the step is traced once."""
    chex.clear_trace_counter()
    with pytest.MonkeyPatch.context() as patch, jax.default_matmul_precision("highest"):
        patch.setattr(step, "train_step", chex.assert_max_traces(step.train_step, n=1))
        return small.train(small.small_config(steps=20), 20)


def test_twenty_steps_leave_frozen_leaves_bit_identical_and_trace_once(reference):
    before, after, frozen = small.random_arrays(reference.program), reference.state["params"], reference.frozen
    for name, array in frozen.items():
        np.testing.assert_array_equal(np.asarray(array), before[name], err_msg=name)
    for name, array in after.items():
        assert not np.array_equal(np.asarray(array), before[name]), f"{name} was not trained"
    assert set(after) | set(frozen) == set(before)
    assert {n.split("/")[0] for n in frozen} == {"unet", "vae", "text_context"}
    assert reference.metrics["loss"][-1] < reference.metrics["loss"][0]


def test_a_step_trains_what_the_table_names():
    parts = {"visual_proj", "unet", "text_context"}
    table = ((f"({'|'.join(parts)})(/.*)?", 1.0), (".*", 0.0))
    found = small.train(small.small_config(batch_size=2, trainable=table, optim__warmup=0.0), 1)
    before, after = (state["params"] for state in found.states)
    assert np.isfinite(found.metrics["loss"][0])
    assert {n.split("/")[0] for n, a in after.items() if not np.array_equal(a, before[n])} == parts


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
    [(2, 4, 1, True), (8, 1, 4, True), pytest.param(8, 1, 4, False, marks=pytest.mark.slow)],
)
def test_losses_do_not_depend_on_devices_or_accumulation(reference, devices, accum, fsdp, shard_frozen):
    mesh = dict(mesh__fsdp=fsdp, mesh__shard_frozen=shard_frozen, mesh__min_shard=64)
    found = small.train(small.small_config(steps=20, accum=accum, **mesh), 4, devices)
    np.testing.assert_allclose(found.metrics["loss"], reference.metrics["loss"][:4], rtol=1e-5)
    assert any("fsdp" in a.sharding.spec for a in found.state["params"].values()) == (fsdp > 1)
    specs = [found.program.arrays[n].sharding.spec for n in found.frozen]
    assert any("fsdp" in spec for spec in specs) == (fsdp > 1 and shard_frozen)


@pytest.mark.parametrize("remat", ["none", "all"])
def test_remat_reaches_the_loss(remat):
    p = small.program(small.small_config(remat=remat))
    batch = {n: a for n, a in p.abstract_batch().items() if n != "row"}
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 8))
    traced = jax.make_jaxpr(lambda arrays, *given: p.skeleton.merge(arrays).loss(*given)[0])(p.arrays, batch, keys)
    assert (str(traced).count(" remat") > 10) == (remat == "all")
