"""Convolutions whose gradients are fast on CPUs inside of loops too.

XLA's CPU compiler brings convolutions into the layout of its fast code outside of loops alone (jax-ml/jax, issue
12868). Within a loop over draws or micro-batches JAX's gradients are 5 to 50 times slower than those written here in
that layout. Programs for other devices are those of `jax.lax.conv_general_dilated`.
"""

import functools
from collections.abc import Sequence

import jax

from diva_jax.models.platform import traced_for

Array = jax.Array
Padding = tuple[tuple[int, int], ...]

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def _plain(x: Array, kernel: Array, strides, padding, lhs_dilation, rhs_dilation, precision) -> Array:
    dilated = dict(lhs_dilation=lhs_dilation, rhs_dilation=rhs_dilation)
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=_LAYOUT, precision=precision, **dilated
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _fast(x: Array, kernel: Array, strides: tuple[int, ...], padding: Padding, precision) -> Array:
    """[B, H, W, in], [h, w, in, out] -> [B, H', W', out]."""
    return _plain(x, kernel, strides, padding, (1, 1), (1, 1), precision)


def _forward(x, kernel, strides, padding, precision):
    return _fast(x, kernel, strides, padding, precision), (x, kernel)


def _backward(strides, padding, precision, given, g):
    x, kernel = given
    sizes = list(zip(x.shape[1:3], kernel.shape[:2], g.shape[1:3], strides, padding, strict=True))
    # Of the input: the gradient, with zeros between its rows, and the kernel turned around.
    around = [(k - 1 - low, n + low - (m - 1) * s - 1) for n, k, m, s, (low, _) in sizes]
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    to_x = _plain(g, turned, (1, 1), around, strides, (1, 1), precision)
    # Of the kernel: images and channels change places.
    around = [(low, (m - 1) * s + k - n - low) for n, k, m, s, (low, _) in sizes]
    to_kernel = _plain(
        x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), (1, 1), around, (1, 1), strides, precision
    ).transpose(1, 2, 0, 3)
    return to_x, to_kernel


_fast.defvjp(_forward, _backward)


def convolve(
    x: Array, kernel: Array, strides: Sequence[int], padding: Padding, *, dimension_numbers, precision=None, **others
) -> Array:
    """`jax.lax.conv_general_dilated` for `nnx.Conv`, channels last, with the gradients of this module on CPUs."""
    plain = jax.lax.conv_general_dilated
    ones = all(d == 1 for name in ("lhs_dilation", "rhs_dilation") for d in others.get(name, (1,)))
    if traced_for() != "cpu" or not ones or others.get("feature_group_count", 1) != 1 or isinstance(padding, str):
        return plain(x, kernel, strides, padding, dimension_numbers=dimension_numbers, precision=precision, **others)
    return _fast(x, kernel, tuple(strides), tuple(map(tuple, padding)), precision)
