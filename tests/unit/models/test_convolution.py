"""Gradients of convolutions on CPUs: the values are jax's own, and loops have the layout of XLA's fast code."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import abstract_mesh, close

from diva_jax.models.convolution import convolve
from diva_jax.models.layers import Keys, Layers

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


@pytest.mark.parametrize("platform", ["tpu", "gpu", None])
def test_other_devices_have_jaxs_program(platform):
    """None: where no mesh was set."""
    layer, x = Layers(Keys()).conv(4, 6, 3, padding=1), jnp.ones((2, 8, 8, 4))
    plain = nnx.Conv(4, 6, (3, 3), padding=((1, 1), (1, 1)), rngs=Keys())

    def program(f):
        return str(jax.make_jaxpr(jax.grad(lambda x: f(x).sum()))(x))

    with contextlib.nullcontext() if platform is None else on(platform):
        assert program(layer) == program(plain)
    with on("cpu"):
        assert program(layer) != program(plain)
