"""un²CLIP: what is refused, what its options change, and its losses for the task `feedback`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from diva_jax import config
from diva_jax.common.errors import UserError
from diva_jax.models.layers import abstract
from diva_jax.objectives import unclip
from diva_jax.training import load


def made(**options):
    """(module with random arrays, its program)."""
    c = small.unclip_config()
    c.unclip.update(options)
    p = small.program(c)
    arrays = small.random_arrays(p)
    return p.skeleton.merge(arrays), p


@pytest.mark.parametrize(
    "field, value, says",
    [
        ("unclip.target", "x0", "unclip.target='x0' must be v or eps"),
        ("unclip.embed_noise", "level1000", "must be none, mean0, random or level<L>"),
        ("unclip.embed_noise", "level", "must be none, mean0, random or level<L>"),
        ("unclip.embed_drop", 1.0, "unclip.embed_drop=1.0 must be"),
        ("backbone.embed_dim", 24, "width 20, but those of config.backbone have 24: use unclip_l with OpenAI's"),
        ("diffusion.unet.class_embed_type", None, "make the config with diffusion='unclip_l' or 'unclip_h'"),
        ("diffusion.scheduler.prediction_type", "epsilon", "expects a generator of v-predictions"),
    ],
)
def test_what_cannot_work_is_one_sentence(field, value, says):
    c = small.unclip_config().unlock()
    *path, leaf = field.split(".")
    section = c
    for part in path:
        section = section[part]
    section[leaf] = value
    with pytest.raises(UserError, match=says) as e:
        abstract(lambda rngs: unclip.Objective(c, rngs=rngs))
    assert "\n" not in str(e.value)


def test_a_generator_of_another_tower_is_refused():
    c = config.default("siglip_so400m", "unclip_l", "unclip")
    with pytest.raises(UserError, match="width 768, but those of config.backbone have 1152"):
        abstract(lambda rngs: unclip.Objective(c, rngs=rngs))


def test_levels():
    levels = {"none": 0, "mean0": 0, "level0": 0, "level250": 250, "random": None}
    assert {n: unclip.UnclipOptions(embed_noise=n).level for n in levels} == levels
    uses = {n: unclip.UnclipOptions(embed_noise=n).uses_statistics for n in levels}
    assert [n for n, used in uses.items() if not used] == ["none"]
    assert not unclip.UnclipOptions(embed_noise="random", stats="off").uses_statistics


def test_class_labels():
    """Codes of level 0; level 0 without noise is nearly the embedding; the slope is sqrt(abar), with any statistics."""
    module, p = made(embed_noise="random")
    assert {"image_normalizer/mean", "image_normalizer/std"} <= set(p.abstract_frozen())
    b, d = 3, small.SPEC.embed_dim
    drawn = module.draw(jax.random.split(jax.random.key(0), b), (2, 3, 4))
    e = jnp.asarray(np.random.default_rng(0).normal(size=(b, d)), jnp.float32)

    def labels(**options):
        module.options = dataclasses.replace(module.options, **options)
        return np.asarray(module.class_labels(e, drawn))

    none = labels(embed_noise="none")
    np.testing.assert_array_equal(none, np.concatenate([e, np.ones((b, d // 2)), np.zeros((b, d // 2))], 1))
    mean0 = labels(embed_noise="mean0", stats="off")
    assert 1e-6 < np.linalg.norm(mean0 - none) / np.linalg.norm(none) < 5e-5
    level = np.asarray(drawn.levels)
    slope = jax.jacobian(lambda x: module.class_labels(x, drawn))
    module.options = dataclasses.replace(module.options, embed_noise="random", stats="on")
    jacobian = np.asarray(slope(e))  # [B, 2d, B, d]
    remaining = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    abar = np.cumprod(1 - np.minimum(1 - remaining[1:] / remaining[:-1], 0.999))
    for i in range(b):
        np.testing.assert_allclose(jacobian[i, :d, i], np.sqrt(abar[level[i]]) * np.eye(d), rtol=1e-4, atol=1e-6)


def test_draws_depend_on_their_own_key_alone():
    module, _ = made(embed_drop=0.5)
    keys = jax.random.split(jax.random.key(3), 40)
    whole, part = module.draw(keys, (2, 3, 4)), module.draw(keys[7:9], (2, 3, 4))
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(a[7:9], b)
    assert 8 < int(whole.keep.sum()) < 32
    assert whole.timesteps.shape == (40,) and len(np.unique(whole.timesteps)) > 30


def test_losses_of_the_conditions():
    module, p = made(embed_noise="random", embed_drop=0.9)
    image = small.batch(p, 0, 2)["image"]
    batch = {"image": image, "other": image[::-1]}
    edges = np.array([0, 400, 1000])
    losses = jax.jit(lambda batch: module.condition_losses(batch, jax.random.split(jax.random.key(0), 2), edges))
    found = {name: np.asarray(x) for name, x in losses(batch).items()}
    assert {x.shape for x in found.values()} == {(2, 2)}
    assert not np.allclose(found["own"], found["other"]) and not np.allclose(found["own"], found["text"])
    same = losses(batch | {"other": image})
    np.testing.assert_allclose(same["own"], same["other"], rtol=1e-5)


def test_statistics_come_from_the_generator(files, tmp_path):
    small.write_unclip(tmp_path / "generator")
    c = small.unclip_config(unclip__embed_noise="level3")
    c.backbone.source, c.diffusion.source = str(files / "clip"), str(tmp_path / "generator")
    p = small.program(c)
    names = ["image_normalizer/mean", "image_normalizer/std"]
    arrays, origins = load.initial_arrays(p, names, every_source=False)
    rng, d = np.random.default_rng(5), small.SPEC.embed_dim
    np.testing.assert_array_equal(arrays[names[0]], rng.normal(size=(1, d)).astype(np.float32))
    np.testing.assert_array_equal(arrays[names[1]], rng.uniform(0.5, 1.5, (1, d)).astype(np.float32))
    assert origins["image_normalizer"]["source"] == ["diffusion_pytorch_model.safetensors"]
    (tmp_path / "generator" / "image_normalizer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="image_normalizer has no weights"):
        load.initial_arrays(p, names, every_source=False)
