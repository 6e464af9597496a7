"""Parity of the VAE's encoder with diffusers' `AutoencoderKL`: latents, names, and unsupported configs."""

import functools
import inspect

import diffusers
import jax
import numpy as np
import pytest
import torch
from flax import nnx
from helpers import close, filled, randomise, tensors

from diva_jax.common.errors import UserError
from diva_jax.models.diffusion import vae
from diva_jax.models.diffusion.vae import VAE, VAEConfig
from diva_jax.models.layers import Keys
from diva_jax.weights import names
from diva_jax.weights.diffusers import VAE as TABLE

SD = dict(
    _class_name="AutoencoderKL",
    act_fn="silu",
    block_out_channels=[128, 256, 512, 512],
    down_block_types=["DownEncoderBlock2D"] * 4,
    in_channels=3,
    latent_channels=4,
    layers_per_block=2,
    norm_num_groups=32,
    out_channels=3,
    sample_size=768,
    up_block_types=["UpDecoderBlock2D"] * 4,
)
# Groups of one to three channels.
TINY = SD | dict(block_out_channels=[8, 16, 24, 24], norm_num_groups=8, layers_per_block=1)


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


def test_full_size_names_and_shapes():
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL.from_config(SD).state_dict()
    ours = names.flat(nnx.eval_shape(lambda: build(SD)))
    shapes = {TABLE.torch_name(p): names.torch_shape(p, v.shape) for p, v in ours.items()}
    assert shapes == {name: tuple(t.shape) for name, t in theirs.items() if not TABLE.ignored(name)}
    # The whole VAE has 83.7 M parameters; those of the decoder are ignored.
    assert sum(t.numel() for t in theirs.values()) == 83_653_863
    assert sum(v.size for v in ours.values()) == 34_163_664


def test_unknown_names_of_the_encoder_are_refused():
    weights = tensors(reference()) | {"encoder.extra.weight": np.zeros(1)}
    del weights["quant_conv.bias"]
    with pytest.raises(UserError, match="missing: quant_conv.bias; unknown: encoder.extra.weight"):
        load(TINY, weights)


def test_every_option_of_diffusers_is_known_with_its_default():
    parameters = inspect.signature(diffusers.AutoencoderKL.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if name != "self"}
    assert set(defaults) == set(vae._USED) | set(vae._FIXED)
    assert VAEConfig.from_dict(defaults) == VAEConfig.from_dict({})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("shift_factor", 0.1),
        ("latents_mean", [0.0, 0.0, 0.0, 0.0]),
        ("mid_block_add_attention", False),
        ("act_fn", "gelu"),
        ("down_block_types", ["DownEncoderBlock2D"] * 3),
        ("down_block_types", ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]),
        ("norm_num_groups", 48),
        ("layers_per_block", [2, 2, 2, 2]),
        ("a_new_option", 3),
    ],
)
def test_refused_options_are_named(option, value):
    with pytest.raises(UserError, match=option):
        VAEConfig.from_dict(SD | {option: value})
