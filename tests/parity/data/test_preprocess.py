"""Both views against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import close
from torchvision.transforms import functional as TF

from diva_jax.data import preprocess
from diva_jax.models.backbones import IMAGENET_MEAN, IMAGENET_STD, OPENAI_MEAN, OPENAI_STD

# Up and down, odd sizes, not square.
SHAPES = [(64, 64, 28), (60, 60, 42), (42, 42, 60), (37, 53, 28), (51, 34, 48), (512, 512, 224)]


def images(*shape, dtype=np.float32):
    return np.random.default_rng(0).random((2, *shape, 3)).astype(dtype)


def torch_resize(x, size, mode, antialias):
    x = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)
    y = F.interpolate(x, size=(size, size), mode=mode, antialias=antialias, align_corners=False)
    return y.permute(0, 2, 3, 1).numpy()


def torch_normalise(x, mean, std):
    x = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)
    return TF.normalize(x, mean, std).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("h, w, size", SHAPES)
@pytest.mark.parametrize("mode", ["faithful", "exact"])
def test_backbone_view_is_torch_interpolate(h, w, size, mode):
    x, mean, std = images(h, w), OPENAI_MEAN, (0.2, 0.3, 0.25)
    if mode == "faithful":
        expected = torch_resize(torch_normalise(x, mean, std), size, "bilinear", False)
    else:
        expected = torch_normalise(torch_resize(x, size, "bicubic", True), mean, std)
    ours = jax.jit(lambda x: preprocess.backbone_view(x, size, mean, std, mode))(x)
    assert ours.dtype == jnp.float32
    # Both compute positions in float32: among 512 pixels they are rounded by 7e-6 pixels (root mean square), and the
    # image changes by at most half of itself from pixel to pixel.
    close(ours, expected, 4e-6)


def test_vae_view():
    x = images(31, 18)
    np.testing.assert_array_equal(preprocess.vae_view(x, "exact"), 2 * x - 1)
    seen = torch_normalise(x, OPENAI_MEAN, OPENAI_STD)
    # Denormalising is normalising with mean' = -mean/std, std' = 1/std.
    mean, std = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)
    back = torch_normalise(seen, tuple(-mean / std), tuple(1 / std))
    close(preprocess.vae_view(x, "faithful"), 2 * back - 1, 1e-6)
    contrast = std / np.array(OPENAI_STD)
    assert 0.81 < contrast.min() < contrast.max() < 0.87  # The range in the docstring.


def test_to_float_is_torchvisions_to_tensor():
    x = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    expected = TF.to_tensor(x[0]).permute(1, 2, 0).numpy()
    # Theirs is one rounding of 6e-8, ours at most two: compiled, it multiplies by the rounded 1 / 255.
    np.testing.assert_allclose(jax.jit(preprocess.to_float)(x)[0], expected, rtol=6e-7, atol=0)
