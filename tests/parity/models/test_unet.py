"""The U-Net, the VAE's encoder, the text encoder and the schedule against diffusers and transformers; their configs:
full-size names and shapes, defaults, and what is refused."""

import functools
import inspect
import json

import diffusers
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from flax import nnx
from helpers import abstract_mesh, close, randomise, refused, tensors
from places import TESTS
from transformers import CLIPTextConfig, CLIPTextModel

from diva_jax.models.diffusion import schedule, unet, vae as vaes
from diva_jax.models.diffusion.presets import PRESETS
from diva_jax.models.diffusion.schedule import ScheduleConfig
from diva_jax.models.diffusion.text_encoder import TextEncoder, TextEncoderConfig
from diva_jax.models.diffusion.unet import UNet, UNetConfig, timestep_embedding
from diva_jax.models.diffusion.vae import VAE, VAEConfig
from diva_jax.models.layers import Keys
from diva_jax.weights import names

SD21_BASE, SD21_UNCLIP = (PRESETS[name]["unet"] for name in ("sd21_base", "unclip_h"))

# Small variants: channels that are not powers of two, groups of one to six channels and, except for "2.1", another
# norm_eps, which applies only to the norms outside the transformers.
_TINY = dict(norm_num_groups=8, sample_size=16)
_PLAIN = _TINY | dict(norm_eps=1e-2, cross_attention_dim=24, layers_per_block=1)
_PLAIN["down_block_types"] = ["CrossAttnDownBlock2D", "DownBlock2D"]
_PLAIN["up_block_types"] = ["UpBlock2D", "CrossAttnUpBlock2D"]
_FOUR = dict(block_out_channels=[16, 24, 48, 48], attention_head_dim=[2, 2, 4, 8], layers_per_block=[1, 2, 1, 1])
# With the projections of 1.5, which are convolutions.
_CLASSES = dict(block_out_channels=[24, 32], attention_head_dim=[3, 2], use_linear_projection=False)
TINY = {
    "2.1": SD21_BASE | _TINY | _FOUR | dict(cross_attention_dim=20),
    "unclip": SD21_UNCLIP | _PLAIN | _CLASSES | dict(projection_class_embeddings_input_dim=10),
    "mini": SD21_BASE | _PLAIN | dict(block_out_channels=[8, 24], attention_head_dim=[1, 3]),
}


def channels_first(x) -> torch.Tensor:
    # Contiguous: with channels-last strides, torch computes the variance as E[x^2] - E[x]^2, which is less accurate.
    return torch.from_numpy(x).movedim(-1, 1).contiguous()


# Part -> (its config, a preset of it, module, table, original).
PARTS = {
    "unet": (UNetConfig, "unclip_h", UNet, names.UNET, diffusers.UNet2DConditionModel),
    "vae": (VAEConfig, "sd21", VAE, names.VAE, diffusers.AutoencoderKL),
    "text_encoder": (TextEncoderConfig, "sd21", TextEncoder, names.TEXT_ENCODER, None),
    "scheduler": (ScheduleConfig, "sd21", None, None, None),
}


def filled(part, options, weights, **kw):
    """The module of a part with weights of its original; keywords as its own."""
    config, _, kind, table, _ = PARTS[part]
    return helpers.filled(nnx.eval_shape(lambda: kind(config.from_dict(options), rngs=Keys(0), **kw)), weights, table)


@functools.cache
def pair(name):
    theirs = randomise(diffusers.UNet2DConditionModel.from_config(TINY[name]))
    return theirs, filled("unet", TINY[name], tensors(theirs))


def batch(name, height, width, tokens):
    """Returns sample, timesteps, context, class labels or None, and a cotangent of the prediction."""
    rng = np.random.default_rng(1)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    labels = TINY[name].get("projection_class_embeddings_input_dim")
    sample, context = normal(2, height, width, 4), normal(2, tokens, TINY[name]["cross_attention_dim"])
    labels = None if labels is None else normal(2, labels)
    return sample, np.array([3, 987]), context, labels, normal(2, height, width, 4)


def run_theirs(unet, sample, timesteps, context, labels, cotangent):
    """Returns diffusers' prediction, channels last, and the gradient with respect to the context."""
    cast = lambda a: None if a is None else torch.from_numpy(a).to(unet.dtype)  # noqa: E731
    context = cast(context).requires_grad_()
    out = unet(channels_first(sample), torch.from_numpy(timesteps), context, class_labels=cast(labels)).sample
    out = out.movedim(1, -1)
    (grad,) = torch.autograd.grad(out, context, cast(cotangent))
    return out.detach().numpy(), grad.numpy()


@jax.jit
def run_ours(unet, sample, timesteps, context, labels, cotangent):
    out, pull = jax.vjp(lambda c: unet(sample, timesteps, c, labels), context)
    return out, pull(cotangent)[0]


@pytest.mark.parametrize(("name", "height", "width", "tokens"), [("2.1", 12, 20, 77), ("unclip", 13, 10, 30)])
def test_parity(name, height, width, tokens):
    theirs, ours = pair(name)
    args = batch(name, height, width, tokens)
    expected, expected_grad = run_theirs(theirs, *args)
    out, grad = run_ours(ours, *args)
    close(out, expected, 2e-5, "prediction")
    close(grad, expected_grad, 2e-5, "gradient of the context")


def test_float64_is_float64_throughout():
    theirs = randomise(diffusers.UNet2DConditionModel.from_config(TINY["mini"])).double()
    sample, timesteps, context, labels, cotangent = batch("mini", 5, 6, 4)
    # Timestep 0, at which the float32 sines and cosines of both libraries are exact.
    args = [a if a is None else a.astype(np.float64) for a in (sample, timesteps * 0, context, labels, cotangent)]
    args[1] = args[1].astype(np.int64)
    expected, expected_grad = run_theirs(theirs, *args)
    with jax.enable_x64(True):
        ours = filled("unet", TINY["mini"], tensors(theirs), dtype=jnp.float64, param_dtype=jnp.float64)
        with jax.sharding.use_abstract_mesh(abstract_mesh("cpu")):
            out, grad = run_ours(ours, *args)
    close(out, expected, 1e-12)
    close(grad, expected_grad, 1e-12)


def test_timestep_embedding():
    t = np.arange(1000)
    options = dict(flip_sin_to_cos=True, downscale_freq_shift=0)
    reference = diffusers.models.embeddings.get_timestep_embedding(torch.from_numpy(t), 320, **options).numpy()
    ours = timestep_embedding(jnp.asarray(t), 320)
    # Frequencies differ by at most one unit in the last place, 2^-23 of them, and each side rounds its product with t
    # by 2^-24: together 2^-22 t, and less than 2^-22 for the cosine or sine. The bound is twice that.
    scale = 1 + t[:, None]
    np.testing.assert_allclose(ours / scale, reference / scale, rtol=0, atol=2**-21)
    close(ours, reference, 2e-5)
    # In bfloat16, the embeddings of 996 to 999 would be equal.
    assert np.unique(np.asarray(ours)[-4:], axis=0).shape[0] == 4


def test_head_counts():
    heads = lambda **kw: UNetConfig.from_dict(SD21_BASE | kw).heads  # noqa: E731
    assert heads() == (5, 10, 20, 20) and heads(attention_head_dim=8) == (8, 8, 8, 8)
    assert heads(attention_head_dim=64, num_attention_heads=[5, 5, 10, 10]) == (5, 5, 10, 10)


def test_class_labels_are_asked_for_and_refused():
    sample, timesteps, context, labels, _ = batch("unclip", 8, 8, 3)
    refused("needs class_labels of width 10", lambda: pair("unclip")[1](sample, timesteps, context))
    refused("takes no class_labels", lambda: pair("mini")[1](sample, timesteps, context, labels))


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


OTHER_VAE = dict(scaling_factor=0.5, use_quant_conv=False, use_post_quant_conv=False, block_out_channels=[8, 8])
OTHER_VAE["down_block_types"] = ["DownEncoderBlock2D"] * 2


@pytest.mark.parametrize(("options", "height", "width"), [({}, 40, 56), ({}, 27, 33), (OTHER_VAE, 6, 10)])
def test_vae(options, height, width):
    """Images with a contrast that is low enough for the epsilons of the norms to have an effect."""
    options = TINY_VAE | options
    levels = len(options["block_out_channels"])
    up = dict(up_block_types=["UpDecoderBlock2D"] * levels)
    theirs = randomise(diffusers.AutoencoderKL.from_config(options | up))
    x = 0.02 * np.random.default_rng(1).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    latents = jax.jit(lambda model, images: model.encode(images))(filled("vae", options, tensors(theirs)), x)
    assert latents.shape == (2, height // 2 ** (levels - 1), width // 2 ** (levels - 1), 4)
    with torch.no_grad():
        mean = theirs.encode(channels_first(x)).latent_dist.mean
    close(latents, options["scaling_factor"] * mean.movedim(1, -1).numpy(), 2e-5)
    # A sample, with logarithms of the variance past the range that both clamp them to.
    moments, noise = (40 * torch.randn(2, n, 5, 6, generator=torch.Generator().manual_seed(n)) for n in (8, 4))
    posterior = DiagonalGaussianDistribution(moments)
    want = options["scaling_factor"] * (posterior.mean + posterior.std * noise).movedim(1, -1)
    close(VAEConfig.from_dict(options).latents(*(a.movedim(1, -1).numpy() for a in (moments, noise))), want, 1e-6)
    weights = tensors(theirs) | {"encoder.extra.weight": np.zeros(1)}
    del weights["encoder.conv_in.bias"]
    refused("missing: encoder.conv_in.bias; unknown: encoder.extra.weight", filled, "vae", options, weights)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("count", [19, 7])
def test_text_encoder(activation, count):
    options = TINY_TEXT | dict(hidden_act=activation)
    theirs = randomise(CLIPTextModel(CLIPTextConfig(**options)))
    ours = filled("text_encoder", options, tensors(theirs))
    tokens = np.random.default_rng(0).integers(1, 51, (2, count))
    tokens[:, 0], tokens[0, 4:], tokens[1, 5:], tokens[:, 4] = 51, 0, 52, 52
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens))[0]
    close(jax.jit(ours.__call__)(tokens), expected, 2e-5)
    refused("20 tokens, shorten it to 19", ours, np.zeros((1, 20), int))


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
    close(schedule.target(latents, noise, abar, timesteps, "v_prediction"), theirs.get_velocity(*args), 1e-6)
    assert np.array_equal(schedule.target(latents, noise, abar, timesteps, "epsilon"), noise)
    half = [jnp.asarray(a, jnp.bfloat16) for a in (latents, noise)]
    out = schedule.add_noise(*half, abar, timesteps)
    precise = schedule.add_noise(*(a.astype(jnp.float32) for a in half), abar, timesteps)
    assert out.dtype == jnp.bfloat16 and np.array_equal(out, precise.astype(jnp.bfloat16))


PARAMETERS = {("sd21_base", "unet"): 865_910_724, ("sd15", "unet"): 859_520_964, ("unclip_h", "unet"): 870_173_124}
PARAMETERS |= {("sd21", "text_encoder"): 340_387_840, ("sd15", "text_encoder"): 123_060_480}
PARAMETERS |= {("sd21_base", "vae"): 34_163_664}  # Of 83,653,863 in all: those of the decoder are ignored.


@pytest.mark.parametrize(("preset", "part"), PARAMETERS)
def test_full_size_names_and_shapes(preset, part):
    (config, _, kind, table, original), options = PARTS[part], PRESETS[preset][part]
    with torch.device("meta"):
        up = {"up_block_types": ["UpDecoderBlock2D"] * 4} if part == "vae" else {}
        model = original.from_config(options | up) if original else CLIPTextModel(CLIPTextConfig(**options))
    theirs = {name: tuple(t.shape) for name, t in model.state_dict().items() if not table.ignored(name)}
    ours = names.flat(nnx.eval_shape(lambda: kind(config.from_dict(options), rngs=Keys(0))))
    assert {table.torch_name(p): names.torch_shape(p, v.shape) for p, v in ours.items()} == theirs
    assert sum(v.size for v in ours.values()) == PARAMETERS[preset, part]


def test_every_option_is_known_with_its_default():
    for part, module in (("unet", unet), ("vae", vaes)):
        config, *_, original = PARTS[part]
        parameters = inspect.signature(original.__init__).parameters
        defaults = {name: p.default for name, p in parameters.items() if name != "self"}
        assert set(defaults) == set(module._USED) | set(module._FIXED)
        assert config.from_dict(defaults) == config.from_dict({})
    assert TextEncoderConfig.from_dict(CLIPTextConfig().to_dict()) == TextEncoderConfig.from_dict({})


REFUSED = json.loads((TESTS / "parity/refused.json").read_text())
REFUSED["unet"] += [[option, "another"] for option in unet._FIXED]
REFUSED["vae"] += [[option, "another"] for option in vaes._FIXED]
SAID = {"_class_name": "UNet2DConditionModel", "model_type": "CLIPTextModel"}  # Where it is not the option's name.


@pytest.mark.parametrize("part", PARTS)
def test_refused_options_are_named(part):
    config, preset, *_ = PARTS[part]
    for option, value in REFUSED[part]:
        refused(SAID.get(option, option), config.from_dict, PRESETS[preset][part] | {option: value})
