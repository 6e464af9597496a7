"""Parity of the U-Net with diffusers' `UNet2DConditionModel`: values, gradients, dtypes, remat."""

import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from helpers import abstract_mesh, close, filled, randomise, refused, tensors

from diva_jax.models.diffusion.presets import PRESETS
from diva_jax.models.diffusion.unet import UNet, UNetConfig, timestep_embedding
from diva_jax.models.layers import Keys
from diva_jax.weights.diffusers import UNET

SD21_BASE, SD21_UNCLIP = (PRESETS[name]["unet"] for name in ("sd21_base", "unclip_h"))

# Small variants: channels that are not powers of two, groups of one to six channels and, except for "2.1", another
# norm_eps, which applies only to the norms outside the transformers.
_TINY = dict(norm_num_groups=8, sample_size=16)
_TWO_LEVELS = _TINY | dict(
    norm_eps=1e-2,
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
)
TINY = {
    "2.1": SD21_BASE
    | _TINY
    | dict(block_out_channels=[16, 24, 48, 48], attention_head_dim=[2, 2, 4, 8], cross_attention_dim=20)
    | dict(layers_per_block=[1, 2, 1, 1]),
    # With the projections of 1.5, which are convolutions.
    "unclip": SD21_UNCLIP
    | _TWO_LEVELS
    | dict(use_linear_projection=False)
    | dict(block_out_channels=[24, 32], attention_head_dim=[3, 2], cross_attention_dim=24, layers_per_block=1)
    | dict(projection_class_embeddings_input_dim=10),
    "mini": SD21_BASE
    | _TWO_LEVELS
    | dict(block_out_channels=[8, 24], attention_head_dim=[1, 3], cross_attention_dim=10, layers_per_block=1),
}


def channels_first(x) -> torch.Tensor:
    # Contiguous: with channels-last strides, torch computes the variance as E[x^2] - E[x]^2, which is less accurate.
    return torch.from_numpy(x).movedim(-1, 1).contiguous()


def build(options, **kw) -> UNet:
    return UNet(UNetConfig.from_dict(options), rngs=Keys(0), **kw)


@functools.cache
def pair(name):
    """Returns diffusers' U-Net with random weights, and ours with the same weights."""
    theirs = randomise(diffusers.UNet2DConditionModel.from_config(TINY[name]))
    return theirs, filled(nnx.eval_shape(lambda: build(TINY[name])), tensors(theirs), UNET)


def batch(name, height, width, tokens, seed=1):
    """Returns sample, timesteps, context, class labels or None, and a cotangent of the prediction."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    options = TINY[name]
    labels = options.get("projection_class_embeddings_input_dim")
    return (
        normal(2, height, width, 4),
        np.array([3, 987]),
        normal(2, tokens, options["cross_attention_dim"]),
        None if labels is None else normal(2, labels),
        normal(2, height, width, 4),
    )


def run_theirs(unet, sample, timesteps, context, labels, cotangent):
    """Returns diffusers' prediction, channels last, and the gradient with respect to the context."""
    dtype = next(unet.parameters()).dtype
    cast = lambda a: None if a is None else torch.from_numpy(a).to(dtype)  # noqa: E731
    context = cast(context).requires_grad_()
    out = unet(channels_first(sample), torch.from_numpy(timesteps), context, class_labels=cast(labels)).sample.movedim(
        1, -1
    )
    (grad,) = torch.autograd.grad(out, context, cast(cotangent))
    return out.detach().numpy(), grad.numpy()


@jax.jit
def run_ours(unet, sample, timesteps, context, labels, cotangent):
    out, pull = jax.vjp(lambda c: unet(sample, timesteps, c, labels), context)
    return out, pull(cotangent)[0]


@pytest.mark.parametrize(
    ("name", "height", "width", "tokens"),
    [("2.1", 12, 20, 77), ("unclip", 13, 10, 30)],
)
def test_parity(name, height, width, tokens):
    theirs, ours = pair(name)
    args = batch(name, height, width, tokens)
    expected, expected_grad = run_theirs(theirs, *args)
    out, grad = run_ours(ours, *args)
    close(out, expected, 2e-5, "prediction")
    close(grad, expected_grad, 2e-5, "gradient of the context")


def test_remat_recomputes_every_block():
    args = batch("mini", 6, 4, 5)[:3]
    primitives = []
    for remat in (False, True):
        model = nnx.eval_shape(functools.partial(build, TINY["mini"], remat=remat))
        jaxpr = jax.make_jaxpr(lambda model, *args: model(*args))(model, *args)
        primitives.append([e.primitive.name for e in jaxpr.eqns])
    # Residual blocks: 1 + 1 down, 2 mid, 2 + 2 up. Transformers: 1 down, 1 mid, 2 up.
    assert [p.count("checkpoint") + p.count("remat2") for p in primitives] == [0, 12]


def test_float64_is_float64_throughout():
    theirs = randomise(diffusers.UNet2DConditionModel.from_config(TINY["mini"])).double()
    sample, timesteps, context, labels, cotangent = batch("mini", 5, 6, 4)
    # Timestep 0, at which the float32 sines and cosines of both libraries are exact.
    args = [a if a is None else a.astype(np.float64) for a in (sample, timesteps * 0, context, labels, cotangent)]
    args[1] = args[1].astype(np.int64)
    expected, expected_grad = run_theirs(theirs, *args)
    with jax.enable_x64(True), jax.sharding.use_abstract_mesh(abstract_mesh("cpu")):
        ours = nnx.eval_shape(lambda: build(TINY["mini"], dtype=jnp.float64, param_dtype=jnp.float64))
        out, grad = run_ours(filled(ours, tensors(theirs), UNET), *args)
    close(out, expected, 1e-12)
    close(grad, expected_grad, 1e-12)


def test_timestep_embedding():
    t = np.arange(1000)
    reference = diffusers.models.embeddings.get_timestep_embedding(
        torch.from_numpy(t), 320, flip_sin_to_cos=True, downscale_freq_shift=0
    ).numpy()
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
    assert heads() == (5, 10, 20, 20)
    assert heads(attention_head_dim=8) == (8, 8, 8, 8)
    assert heads(attention_head_dim=64, num_attention_heads=[5, 5, 10, 10]) == (5, 5, 10, 10)


def test_class_labels_are_asked_for_and_refused():
    sample, timesteps, context, labels, _ = batch("unclip", 8, 8, 3)
    refused("needs class_labels of width 10", lambda: pair("unclip")[1](sample, timesteps, context))
    refused("takes no class_labels", lambda: pair("mini")[1](sample, timesteps, context, labels))
