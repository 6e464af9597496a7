"""un²CLIP: what its options change, and its losses for the task `feedback`."""

import jax
import numpy as np
import pytest
import small

from diva_jax.common.errors import UserError
from diva_jax.data import preprocess
from diva_jax.training import load


def made(**options):
    """(module with random arrays, its program)."""
    c = small.unclip_config()
    c.unclip.update(options)
    p = small.program(c)
    arrays = small.random_arrays(p)
    return p.skeleton.merge(arrays), p


@pytest.mark.parametrize("option, mode", [("ldm", "aligned"), ("processor", "exact")])
def test_the_view_of_the_encoder(option, mode):
    """tests/parity compares the aligned one with kornia's formula."""
    module, _ = made(clip_view=option)
    pixels = jax.random.uniform(jax.random.key(0), (2, 30, 30, 3))
    s = module.spec
    want = preprocess.backbone_view(pixels, s.image_size, s.mean, s.std, mode)
    np.testing.assert_array_equal(module.views(pixels)[1], want)


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
    image = small.batch(p, 0)["image"][:2]
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
