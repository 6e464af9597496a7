"""Parity of the VAE's encoder with diffusers' `AutoencoderKL`: latents, names, and unsupported configs."""

import functools

import diffusers
import jax
import numpy as np
import pytest
import torch
from flax import nnx
from helpers import close, filled, randomise, tensors

from diva_jax.common.errors import UserError
from diva_jax.models.diffusion.presets import PRESETS
from diva_jax.models.diffusion.vae import VAE, VAEConfig
from diva_jax.models.layers import Keys
from diva_jax.weights import names
from diva_jax.weights.diffusers import VAE as TABLE

# Groups of one to three channels.
TINY = PRESETS["sd21"]["vae"] | dict(block_out_channels=[8, 16, 24, 24], norm_num_groups=8, layers_per_block=1)


def build(options) -> VAE:
    return VAE(VAEConfig.from_dict(options), rngs=Keys(0))


def load(options, weights) -> VAE:
    return filled(nnx.eval_shape(lambda: build(options)), weights, TABLE)


@functools.cache
def reference():
    return randomise(diffusers.AutoencoderKL.from_config(TINY))


encode = jax.jit(lambda model, images: model.encode(images))


def images(height, width):
    """Returns images with a contrast that is low enough for the epsilons of the norms to have an effect."""
    return 0.02 * np.random.default_rng(1).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)


def expected_latents(model, x, scale=0.18215):
    # Contiguous: with channels-last strides, torch computes the variance as E[x^2] - E[x]^2, which is less accurate.
    x = torch.from_numpy(x).movedim(-1, 1).contiguous()
    with torch.no_grad():
        mean = model.encode(x).latent_dist.mean
    return scale * mean.movedim(1, -1).numpy()


@pytest.mark.parametrize(("height", "width"), [(40, 56), (27, 33)])
def test_parity(height, width):
    x = images(height, width)
    latents = encode(load(TINY, tensors(reference())), x)
    assert latents.shape == (2, height // 8, width // 8, 4)
    close(latents, expected_latents(reference(), x), 2e-5)


def test_scaling_factor_and_no_quant_conv():
    options = TINY | dict(scaling_factor=0.5, use_quant_conv=False, use_post_quant_conv=False)
    options |= dict(block_out_channels=[8, 8], down_block_types=["DownEncoderBlock2D"] * 2)
    theirs = randomise(diffusers.AutoencoderKL.from_config(options | dict(up_block_types=["UpDecoderBlock2D"] * 2)))
    x = images(6, 10)
    latents = encode(load(options, tensors(theirs)), x)
    close(latents, expected_latents(theirs, x, 0.5), 2e-5)


def test_old_attention_names():
    """Checkpoints of older diffusers versions, which had another attention class, are read too."""
    old = {}
    for name, array in tensors(reference()).items():
        for new_part, old_part in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f"attentions.0.{new_part}.", f"attentions.0.{old_part}.")
        old[name] = array
    assert "encoder.mid_block.attentions.0.query.weight" in old
    states = [names.flat(load(TINY, weights)) for weights in (old, tensors(reference()))]
    assert all(np.array_equal(states[0][p].get_value(), v.get_value()) for p, v in states[1].items())


def test_unknown_names_of_the_encoder_are_refused():
    weights = tensors(reference()) | {"encoder.extra.weight": np.zeros(1)}
    del weights["quant_conv.bias"]
    with pytest.raises(UserError, match="missing: quant_conv.bias; unknown: encoder.extra.weight"):
        load(TINY, weights)
