"""The patch code in place of a VAE."""

import jax
import numpy as np
import pytest

from diva_jax.common.errors import UserError
from diva_jax.models.diffusion.presets import Diffusion
from diva_jax.world import drawing, models, patch_code, scenes


def test_the_code_is_orthonormal_and_keeps_most_of_the_world():
    basis, scale = models.basis()
    np.testing.assert_allclose(basis.T @ basis, np.eye(64), atol=1e-9)
    images = drawing.draw(scenes.sample(np.random.default_rng(3), 60)).astype(np.float32) / 127.5 - 1
    d = Diffusion.from_dict(dict(source="", prompt="", text_tokens=4, **models.DIFFUSION))
    code = d.vae.build()
    code.basis[...] = jax.numpy.asarray(basis, np.float32)
    latents = code.encode(images)
    assert latents.shape == (60, 2, 2, 64) and abs(scale - d.vae.scaling_factor) < 0.02
    assert 0.8 < float(np.std(np.asarray(latents))) < 1.2
    back = np.asarray(code.decode(latents))
    assert np.mean((back - images) ** 2) < 0.08 * np.var(images)
    # What has been projected once stays as it is.
    np.testing.assert_allclose(code.decode(code.encode(back)), back, atol=1e-5)


def test_other_shapes():
    config = patch_code.PatchCodeConfig.from_dict({"patch_size": 2, "latent_channels": 5, "in_channels": 3})
    code = patch_code.PatchCode(config)
    assert code.encode(np.ones((1, 6, 10, 3), np.float32)).shape == (1, 3, 5, 5)
    with pytest.raises(UserError, match="keeps 13 numbers of a patch that has only 12"):
        patch_code.PatchCodeConfig.from_dict({"patch_size": 2, "latent_channels": 13})
    with pytest.raises(UserError, match="unknown option .?block_out_channels"):
        patch_code.PatchCodeConfig.from_dict({"block_out_channels": [8]})
