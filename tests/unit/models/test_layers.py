"""Norms, GELU and GEGLU in bfloat16, gradients of convolutions, and the information of a condition in nats."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import abstract_mesh, close, rounded

from diva_jax.costs import chips
from diva_jax.models.diffusion import schedule
from diva_jax.models.diffusion.blocks import Upsample
from diva_jax.models.layers import Keys, Layers, convolve, geglu, gelu


def value_and_gradient(fn, x, dy):
    """As float64 arrays, from those of the type of `x`."""

    def both(x, dy):
        y, pull = jax.vjp(fn, x)
        return y, *pull(dy)

    found = jax.jit(both)(x, dy)
    assert {a.dtype for a in found} == {x.dtype}
    return [np.asarray(a, np.float64) for a in found]


def normalised(kind: str, x):
    y, axes = (x, (-1,)) if kind == "layer" else (x.reshape(*x.shape[:-1], 3, -1), (1, 2, -1))
    return ((y - y.mean(axes, keepdims=True)) / (y.var(axes, keepdims=True) + 1e-5) ** 0.5).reshape(x.shape)


@pytest.mark.parametrize("ratio", (0.0, 10.0, 100.0))  # Mean by standard deviation.
@pytest.mark.parametrize("kind", ["layer", "group"])
def test_norms_are_the_formula(kind, ratio):
    """Rounded once, forward and backward, whatever the mean; finite where the input is constant."""
    rng, layers = np.random.default_rng(int(ratio)), Layers(Keys(), jnp.bfloat16, jnp.bfloat16)
    norm = layers.layer_norm(33, 1e-5) if kind == "layer" else layers.group_norm(33, 3, 1e-5)
    x, dy = (jnp.asarray(rng.normal(size=(2, 9, 7, 33)) + mean, jnp.bfloat16) for mean in (ratio, 0))
    found = value_and_gradient(norm, x, dy)
    with jax.enable_x64(True):
        wanted = value_and_gradient(functools.partial(normalised, kind), *(np.asarray(a, np.float64) for a in (x, dy)))
    for ours, want in zip(found, wanted, strict=True):
        close(ours, want, 4e-3)
    assert np.isfinite(value_and_gradient(norm, jnp.full_like(x, 777.0), dy)).all()


plain_gelu = functools.partial(jax.nn.gelu, approximate=False)


def plain_geglu(x):
    value, gate = jnp.split(x, 2, -1)
    return value * plain_gelu(gate)


def generated(seed, width):
    rng = np.random.default_rng(seed)
    shape = (3, 41, width)
    return jnp.asarray(rng.normal(size=shape) * rng.choice([0.01, 1.0, 4.0, 30.0], size=shape), jnp.bfloat16)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ours, plain", [(geglu, plain_geglu), (gelu, plain_gelu)], ids=["geglu", "gelu"])
def test_bfloat16(ours, plain, seed):
    """Within the rounding of the result and the fit's error of 4e-6 (density: 1e-5), no worse than `jax.nn.gelu`'s."""
    given = generated(seed, 2 * 57), generated(seed + 10, 57 if ours is geglu else 2 * 57)
    results = [value_and_gradient(fn, *given) for fn in (ours, plain)]
    wide, d = (np.asarray(a, np.float64) for a in given)
    with jax.enable_x64(True):
        wanted = value_and_gradient(plain, wide, d)
    value, gate = np.split(wide, 2, -1) if ours is geglu else (1, wide)
    fit = np.minimum(np.abs(gate), 6) + 1
    parts = [np.abs(d) * fit, np.abs(d * value) * fit][0 if ours is geglu else 1 :]
    for found, want, scale in zip(results[0], wanted, (np.abs(value) * fit, np.concatenate(parts, -1)), strict=True):
        rounded(found, want, 2**-8, 1e-5, scale=scale)
    for found, theirs, want in [*zip(*results, wanted, strict=True)][: 1 if ours is geglu else 2]:
        assert np.linalg.norm(found - want) <= np.linalg.norm(theirs - want)


def test_float32_is_the_formula_and_extremes_are_finite():
    x = generated(0, 2 * 57).astype(jnp.float32)
    np.testing.assert_array_equal(geglu(x), plain_geglu(x))
    np.testing.assert_array_equal(gelu(x), plain_gelu(x))
    y, pull = jax.vjp(geglu, jnp.asarray([[1.0, 1.0, 1.0, 1e30, -1e30, 0.0]], jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.float32(jnp.asarray([[1e30, 0, 0]], jnp.bfloat16)))
    assert np.all(np.isfinite(np.asarray(pull(jnp.ones_like(y))[0], np.float32)))


LAYOUT = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"))


def on(platform: str):
    return jax.sharding.use_abstract_mesh(abstract_mesh(platform, (1, 1)))


CASES = [
    # (height, width), (h, w) of the kernel, strides, padding
    ((11, 8), (3, 3), (1, 1), ((1, 1), (1, 1))),
    ((11, 8), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((10, 7), (3, 3), (2, 2), ((0, 1), (0, 1))),  # As in the VAE.
    ((13, 9), (1, 1), (1, 1), ((0, 0), (0, 0))),
    ((17, 12), (5, 5), (5, 5), ((0, 0), (0, 0))),  # Patches; rows and columns are left over.
    ((9, 14), (2, 5), (3, 1), ((2, 0), (1, 3))),
]


@pytest.mark.parametrize("size, window, strides, padding", CASES)
def test_gradients_are_jaxs(size, window, strides, padding):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, *size, 4)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(*window, 4, 6)), jnp.float32)

    def loss(conv, x, kernel):
        return jnp.sum(jnp.sin(conv(x, kernel, strides, padding, **LAYOUT)))

    want = jax.grad(lambda *a: loss(jax.lax.conv_general_dilated, *a), (0, 1))(x, kernel)
    with on("cpu"):
        got = jax.grad(lambda *a: loss(convolve, *a), (0, 1))(x, kernel)
    for ours, theirs in zip(got, want, strict=True):
        close(ours, theirs, 2e-6)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_upsampling_multiplies_each_of_the_pixels_it_sees_once(dtype, tolerance):
    """Forward and backward, where no kernel is reversed, which XLA would do again in each turn of a loop."""
    rng, layer = np.random.default_rng(0), Upsample(7, Layers(Keys(), dtype))
    x = jnp.asarray(rng.normal(size=(2, 5, 3, 7)), dtype)
    layer.conv.bias[...] = jnp.arange(7.0)

    def plain(x, size):
        return layer.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)[:, : size[0], : size[1]])

    for size in [(10, 6), (9, 6), (10, 5), (9, 5)]:
        calls, dy = [functools.partial(f, size=size) for f in (layer, plain)], rng.normal(size=(2, *size, 7))
        for ours, theirs in zip(*(value_and_gradient(f, x, jnp.asarray(dy, dtype)) for f in calls), strict=True):
            close(ours, theirs, tolerance)
    assert "rev[" not in str(jax.make_jaxpr(jax.grad(lambda x: layer(x, (10, 6)).sum()))(x))
    programs = [jax.make_jaxpr(f, static_argnums=1)(x, (10, 6)).jaxpr for f in (layer, plain)]
    assert np.divide(*(chips.flops_by_part(p).total() for p in programs)) == 4 / 9


def looped_gradient(layer: nnx.Conv, x: jax.Array) -> str:
    """The compiled program of three gradients in a loop, to the input and to the weights."""
    graph, params = nnx.split(layer)

    def step(given, _):
        to = jax.grad(lambda g: jnp.sum(jnp.square(nnx.merge(graph, g[1])(g[0]))))(given)
        return jax.tree.map(lambda a, b: a - 0.1 * b, given, to), None

    return jax.jit(lambda *a: jax.lax.scan(step, a, length=3)[0]).lower(x, params).compile().as_text()


def test_in_a_loop_all_have_the_fast_layout():
    layer, x = Layers(Keys()).conv(4, 6, 3, stride=2, padding=1), jnp.ones((2, 8, 8, 4))
    slow = re.compile(r"dim_labels=(?!b01f_01io->b01f)\S+")
    # If jax's own gradient has it too, this module is not needed any more.
    assert slow.search(looped_gradient(layer, x))
    with on("cpu"):
        text = looped_gradient(layer, x)
    assert text.count("dim_labels=b01f_01io->b01f") >= 3 and not slow.search(text), slow.search(text)


@pytest.mark.parametrize("platform", ["tpu", "gpu", None])  # None: no mesh was set.
def test_other_devices_have_jaxs_program(platform):
    layer, x = Layers(Keys()).conv(4, 6, 3, padding=1), jnp.ones((2, 8, 8, 4))

    def program(f):
        return str(jax.make_jaxpr(jax.grad(lambda x: f(x).sum()))(x))

    plain = program(nnx.Conv(4, 6, (3, 3), padding=((1, 1), (1, 1)), rngs=Keys()))
    with contextlib.nullcontext() if platform is None else on(platform):
        assert program(layer) == plain
    with on("cpu"):
        assert program(layer) != plain


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "squaredcos_cap_v2"])
def test_a_gaussian_has_the_mutual_information_of_its_condition(kind, beta_schedule):
    """x = c + noise of variance 0.3, c of variance 1.7; the errors are those of the best predictions."""
    config = schedule.ScheduleConfig(beta_schedule=beta_schedule, prediction_type=kind)
    left = schedule.alphas_cumprod(config).astype(np.float64)
    snr, with_condition, without = left / (1 - left), 0.3, 2.0

    def error(variance):
        of_noise = snr * variance / (1 + snr * variance)
        return of_noise if kind == "epsilon" else of_noise / left

    gap = error(without) - error(with_condition)
    values = 35
    nats = (schedule.nats_per_error(config, values) * gap).sum()
    # The noise levels of the schedule are not all, so the exact value is that of the integral between its ends.
    ends = [0.5 * values * np.log((1 + r * without) / (1 + r * with_condition)) for r in (snr[0], snr[-1])]
    assert nats == pytest.approx(ends[0] - ends[1], rel=3e-3)
    assert nats == pytest.approx(0.5 * values * np.log(without / with_condition), rel=0.02)
