"""Parity of the VAE's encoder, the text encoder and the noise schedule with diffusers and transformers."""

import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from helpers import close, filled, randomise, refused, tensors
from safetensors.numpy import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from diva_jax.models.diffusion import schedule
from diva_jax.models.diffusion.presets import PRESETS
from diva_jax.models.diffusion.schedule import ScheduleConfig
from diva_jax.models.diffusion.text_encoder import TextEncoder, TextEncoderConfig
from diva_jax.models.diffusion.vae import VAE, VAEConfig
from diva_jax.models.layers import Keys
from diva_jax.weights import diffusers as tables
from diva_jax.weights import names

# Groups of one to three channels.
TINY_VAE = PRESETS["sd21"]["vae"] | dict(block_out_channels=[8, 16, 24, 24], norm_num_groups=8, layers_per_block=1)
TINY_TEXT = PRESETS["sd21"]["text_encoder"] | dict(hidden_size=36, intermediate_size=100, layer_norm_eps=1e-3)
TINY_TEXT |= dict(max_position_embeddings=19, num_attention_heads=3, num_hidden_layers=2, vocab_size=53)
TINY_TEXT |= dict(bos_token_id=51, eos_token_id=52)
SD = PRESETS["sd21_base"]["scheduler"]
SCHEDULES = {
    "2.1-base": SD,
    "linear": SD | dict(beta_schedule="linear", num_train_timesteps=317),
    "cosine": SD | dict(beta_schedule="squaredcos_cap_v2"),
    "defaults": {},
}


def vae(options, weights) -> VAE:
    return filled(nnx.eval_shape(lambda: VAE(VAEConfig.from_dict(options), rngs=Keys(0))), weights, tables.VAE)


def text_encoder(options, weights) -> TextEncoder:
    made = nnx.eval_shape(lambda: TextEncoder(TextEncoderConfig.from_dict(options), rngs=Keys(0)))
    return filled(made, weights, tables.TEXT_ENCODER)


@pytest.mark.parametrize(
    ("options", "height", "width"),
    [
        ({}, 40, 56),
        ({}, 27, 33),
        (
            dict(scaling_factor=0.5, use_quant_conv=False, use_post_quant_conv=False, block_out_channels=[8, 8])
            | dict(down_block_types=["DownEncoderBlock2D"] * 2),
            6,
            10,
        ),
    ],
)
def test_vae(options, height, width):
    """Images with a contrast that is low enough for the epsilons of the norms to have an effect."""
    options = TINY_VAE | options
    levels = len(options["block_out_channels"])
    theirs = randomise(
        diffusers.AutoencoderKL.from_config(options | dict(up_block_types=["UpDecoderBlock2D"] * levels))
    )
    x = 0.02 * np.random.default_rng(1).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    latents = jax.jit(lambda model, images: model.encode(images))(vae(options, tensors(theirs)), x)
    assert latents.shape == (2, height // 2 ** (levels - 1), width // 2 ** (levels - 1), 4)
    with torch.no_grad():
        # Contiguous: with channels-last strides, torch computes the variance as E[x^2] - E[x]^2: less accurate.
        mean = theirs.encode(torch.from_numpy(x).movedim(-1, 1).contiguous()).latent_dist.mean
    close(latents, options["scaling_factor"] * mean.movedim(1, -1).numpy(), 2e-5)
    weights = tensors(theirs) | {"encoder.extra.weight": np.zeros(1)}
    del weights["encoder.conv_in.bias"]
    refused("missing: encoder.conv_in.bias; unknown: encoder.extra.weight", vae, options, weights)


@functools.cache
def pair(activation):
    options = TINY_TEXT | dict(hidden_act=activation)
    theirs = randomise(CLIPTextModel(CLIPTextConfig(**options)))
    return theirs, text_encoder(options, tensors(theirs))


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("count", [19, 7])
def test_text_encoder(activation, count):
    theirs, ours = pair(activation)
    tokens = np.random.default_rng(0).integers(1, 51, (2, count))
    tokens[:, 0], tokens[0, 4:], tokens[1, 5:], tokens[:, 4] = 51, 0, 52, 52
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens))[0]
    close(jax.jit(ours.__call__)(tokens), expected, 2e-5)
    refused("20 tokens, shorten it to 19", ours, np.zeros((1, 20), int))


def test_names_of_all_versions_of_the_text_encoder(tmp_path):
    theirs, ours = pair("gelu")
    theirs.save_pretrained(tmp_path)
    now = load_file(tmp_path / "model.safetensors")
    # Older versions had a prefix, and the oldest ones also saved the position ids.
    old = {f"text_model.{name}": array for name, array in now.items()}
    old["text_model.embeddings.position_ids"] = np.arange(19)[None]
    for weights in (now, old):
        loaded = names.flat(text_encoder(TINY_TEXT, weights))
        assert all(np.array_equal(loaded[p].get_value(), v.get_value()) for p, v in names.flat(ours).items())


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(name):
    """Products, noise and targets, which bfloat16 inputs do not round."""
    config, theirs = ScheduleConfig.from_dict(SCHEDULES[name]), diffusers.DDPMScheduler.from_config(SCHEDULES[name])
    abar, rng = schedule.alphas_cumprod(config), np.random.default_rng(0)
    assert abar.dtype == np.float32 and abar.shape == theirs.alphas_cumprod.shape
    # Where a beta differs in its last place, 1 - beta may be rounded to the neighbour, by 2^-24: in 33 of 1000 steps.
    np.testing.assert_allclose(abar, theirs.alphas_cumprod.numpy(), rtol=33 * 2**-24)
    latents, noise = rng.standard_normal((2, 3, 5, 7, 4)).astype(np.float32)
    timesteps = np.array([0, 131, len(abar) - 1])
    args = [torch.from_numpy(a) for a in (latents, noise, timesteps)]
    close(schedule.add_noise(latents, noise, abar, timesteps), theirs.add_noise(*args), 1e-6)
    velocity = schedule.target(latents, noise, abar, timesteps, "v_prediction")
    close(velocity, theirs.get_velocity(*args), 1e-6)
    assert np.array_equal(schedule.target(latents, noise, abar, timesteps, "epsilon"), noise)
    half = [jnp.asarray(a, jnp.bfloat16) for a in (latents, noise)]
    out = schedule.add_noise(*half, abar, timesteps)
    precise = schedule.add_noise(*(a.astype(jnp.float32) for a in half), abar, timesteps)
    assert out.dtype == jnp.bfloat16 and np.array_equal(out, precise.astype(jnp.bfloat16))
