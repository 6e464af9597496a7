"""What holds for every objective and its step: devices, accumulation, and what is refused."""

import json
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import small
from helpers import close, refused
from places import ROOT
from specs import DINOV2

from diva_jax import config
from diva_jax.common import config_files
from diva_jax.training import step


def small_adapters(p):
    return {n: 0.05 * a if n.endswith("lora/b") else a for n, a in small.random_arrays(p).items()}


FSDP = dict(mesh__fsdp=2, mesh__min_shard=64)
# Objective -> (fields of its config, those on eight devices alone).
DEVICES = {
    # With everything that it can draw, and an anchor and an average. AdamW divides the key biases' gradient, which is
    # rounding alone, by its own size: 1e-8 would show it.
    "unclip": (dict(anchor__weight=0.1, ema__decay=0.5, optim__eps=1e-4), FSDP | dict(mesh__fsdp=4)),
    # Eight devices hold half a group each; passes one condition at a time are computed again in the backward pass.
    "dcr": (dict(condition__warmup_steps=0, dcr__tile=11), dict(dcr__tile=2)),
    # The adapters' dropout included.
    "genhancer": (dict(genhancer__stage1_steps=0, genhancer__stage2="all"), FSDP | dict(mesh__fsdp=8)),
    # Everything that it can draw, and both sides of the loss.
    "judge": (dict(judge__verdict="shuffled", judge__image_weight=0.3, judge__beta=3.0, optim__lr=1e-3), FSDP),
    "kuea": ({}, {}),
    "salm": (dict(accum=2), FSDP),
    # All terms, two micro-batches.
    "comclip": (dict(accum=2, relation__with_self=False), {}),
    "smartclip": (dict(trainable=(("mask_net/.*", 3.0), (".*", 1.0))), {}),
}
DEVICES["unclip"][0].update(unclip__embed_noise="random", unclip__embed_drop=0.3)
DEVICES["genhancer"][0].update(optim__lr=1e-3, optim__warmup_steps=0)
ARRAYS = {"dcr": small_adapters, "kuea": small.kuea_arrays}


def config_of(name: str, fields):
    """The small config of an objective with these fields, or the default one of a tuple's backbone and diffusion."""
    if isinstance(fields, tuple):
        return config.default(*fields, objective=name)
    fields = {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()}
    return small.with_fields(getattr(small, f"{name}_config")().unlock(), fields)


@pytest.mark.parametrize("name", DEVICES)
def test_losses_do_not_depend_on_devices(name):
    (fields, more), arrays = DEVICES[name], ARRAYS.get(name, small.random_arrays)
    alone = small.train(config_of(name, fields), 3, 1, arrays)
    shared = small.train(config_of(name, fields | more), 3, 8, arrays)
    for metric, values in alone.metrics.items():
        np.testing.assert_allclose(shared.metrics[metric], values, rtol=3e-5, err_msg=metric)
    p = shared.program
    if p.config.ema.decay:
        for kind in ("params", "ema"):
            for n, a in alone.states[-1][kind].items():
                close(shared.states[-1][kind][n], a, 1e-3, n)
        assert any(n.startswith("anchor/") for n, a in p.arrays.items() if "fsdp" in a.sharding.spec)
        assert all(p.abstract_state(0)["ema"][n].sharding == p.arrays[n].sharding for n in p.trained)


REFUSED = json.loads(Path(__file__).with_name("refused.json").read_text())
REFUSED += [(name, (DINOV2,), "dinov2 backbone has") for name in ("judge", "comclip", "smartclip")]
REFUSED.append(("unclip", ("siglip_so400m", "unclip_l"), "width 768, but those of .* have 1152"))


@pytest.mark.parametrize("name, fields, says", REFUSED)
def test_what_does_not_fit_is_one_sentence(name, fields, says):
    """Before anything is loaded, of shapes; test_config.py has the rules of each field."""
    c = config_of(name, fields)
    refused(says, lambda: config.validate(c, 1) or small.program(c))


def test_a_mesh_of_another_size_is_refused():
    c = config_files.read(ROOT / "configs/genhancer_vitl14")
    refused("config.mesh.fsdp=16 does not divide the 8 devices", small.program, c, 8)


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
    ends = [path[-1] for path, _ in jax.tree_util.tree_flatten_with_path(state["opt"])[0]]
    names = {end.key for end in ends if isinstance(end, jax.tree_util.DictKey)}
    assert names == set(p.trained) == set(state["params"])
    assert all(n.startswith(("vision/blocks/1/", "visual_proj/")) for n in names)


@pytest.mark.parametrize("shard_frozen", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_losses_of_diva_do_not_depend_on_devices(reference, shard_frozen):
    """Nor on accumulation, as its steps are PyTorch's of the whole batch."""
    mesh = dict(mesh__fsdp=4, mesh__shard_frozen=shard_frozen, mesh__min_shard=64)
    found = small.train(small.small_config(steps=20, **mesh), 4, 8)
    np.testing.assert_allclose(found.metrics["loss"], reference.metrics["loss"][:4], rtol=1e-5)
    assert any("fsdp" in a.sharding.spec for a in found.state["params"].values())
    specs = [found.program.arrays[n].sharding.spec for n in found.frozen]
    assert any("fsdp" in spec for spec in specs) == shard_frozen


@pytest.mark.parametrize("remat", ["none", "all"])
def test_remat_reaches_the_loss(remat):
    p = small.program(small.small_config(remat=remat))
    batch = {n: a for n, a in p.abstract_batch().items() if n != "row"}
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 8))
    traced = jax.make_jaxpr(lambda arrays, *given: p.skeleton.merge(arrays).loss(*given)[0])(p.arrays, batch, keys)
    assert (str(traced).count(" remat") > 10) == (remat == "all")
