"""The residual feed-forward layer of a transformer block as Pallas kernels for TPUs: norm, GEGLU and sum in one pass.

Tokens are [B, C, N], as in `flash.py`. A tile of them and the weights stay in VMEM from the LayerNorm to the residual
sum, and the products of one part of the hidden units overlap with the vector operations of another, which in XLA take
longer than the products. The rows of the weights stream through the matrix unit, so that a result of 320 channels does
not occupy it as 384 would.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from diva_jax.models.layers import Array, geglu_gradient, normal_cdf
from diva_jax.models.platform import dot, tile

# Names of the kernels in compiled programs, followed by the number of hidden units; costs/hlo.py counts their FLOPs by
# these names.
FORWARD, BACKWARD = "feed_forward_forward_h", "feed_forward_backward_h"
MAX_PART = 640  # Largest number of hidden units per part.
# Largest number of channels -> largest number of tokens per tile, and the limit of VMEM for a kernel [bytes]. The
# weights, one tile of the projection for each of two steps of the grid, and one part in float32 must fit, on a v5p in
# 16 and 28 MiB. The first limit is close to it, because XLA keeps fewer arrays in VMEM with a larger one (at commit
# 7b49ded, with 24 MiB, `bench/unet.py --part=transformer` prints 3.35 instead of 2.90 ms).
TILES = {320: (512, 18 * 2**20), 640: (256, 32 * 2**20)}


def fits() -> bool:
    """Returns whether the TPU that is traced for has the VMEM: v5e, v5p and newer ones; a core of a v4 has 16 MiB."""
    return pltpu.get_tpu_info().vmem_capacity_bytes > max(vmem for _, vmem in TILES.values())


def _normalised(x: Array, epsilon: float) -> tuple[Array, Array]:
    """[C, N], float32 -> the same with mean 0 and variance 1 per token, and the inverse deviations, [1, N]."""
    mean = jnp.mean(x, axis=0, keepdims=True)
    variance = jnp.maximum(jnp.mean(x * x, axis=0, keepdims=True) - mean * mean, 0)
    inverse = jax.lax.rsqrt(variance + epsilon)
    return (x - mean) * inverse, inverse


def _parts(hidden: int) -> list[tuple[slice, slice]]:
    """Rows of values and of their gates in the projection, part by part."""
    size = tile(hidden, MAX_PART)
    return [(slice(a, a + size), slice(hidden + a, hidden + a + size)) for a in range(0, hidden, size)]


def _forward_kernel(x_ref, scale_ref, shift_ref, w_in_ref, b_in_ref, w_out_ref, b_out_ref, y_ref, *saved, epsilon):
    x = x_ref[...].astype(jnp.float32)
    z = (_normalised(x, epsilon)[0] * scale_ref[...] + shift_ref[...]).astype(x_ref.dtype)
    out = x + b_out_ref[...]
    for values, gates in _parts(w_out_ref.shape[1]):
        value = dot(w_in_ref[values], z) + b_in_ref[values]
        gate = dot(w_in_ref[gates], z) + b_in_ref[gates]
        for ref in saved:
            ref[values], ref[gates] = value.astype(ref.dtype), gate.astype(ref.dtype)
        out += dot(w_out_ref[:, values], (value * gate * normal_cdf(gate)).astype(z.dtype))
    y_ref[...] = out.astype(y_ref.dtype)


def _backward_kernel(x_ref, h_ref, dy_ref, scale_ref, w_in_ref, w_out_ref, dx_ref, *, epsilon):
    dy = dy_ref[...]
    dz = jnp.zeros(x_ref.shape, jnp.float32)
    for values, gates in _parts(w_out_ref.shape[0]):
        d = dot(w_out_ref[values], dy)
        value, gate = (h_ref[rows].astype(jnp.float32) for rows in (values, gates))
        for rows, part in zip((values, gates), geglu_gradient(value, gate, d), strict=True):
            dz += dot(w_in_ref[:, rows], part.astype(dy.dtype))
    normal, inverse = _normalised(x_ref[...].astype(jnp.float32), epsilon)
    dz *= scale_ref[...]
    along = jnp.mean(dz * normal, axis=0, keepdims=True)
    dx = inverse * (dz - jnp.mean(dz, axis=0, keepdims=True) - normal * along)
    dx_ref[...] = (dx + dy.astype(jnp.float32)).astype(dx_ref.dtype)


def _call(kernel, name: str, tiled: list[Array], whole: list[Array], rows: list[int], epsilon: float, interpret: bool):
    """Runs a kernel for each tile of tokens, [B, channels, N]; `rows` has the channels of each result."""
    batch, channels, n = tiled[0].shape
    most, vmem = next(TILES[limit] for limit in TILES if channels <= limit)
    size = tile(n, most)

    def spec(channels: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, channels, size), lambda b, i: (b, 0, i))

    return pl.pallas_call(
        functools.partial(kernel, epsilon=epsilon),
        name=name,
        grid=(batch, n // size),
        in_specs=[spec(t.shape[1]) for t in tiled]
        + [pl.BlockSpec(w.shape, lambda b, i: (0, 0), pipeline_mode=pl.Buffered(1)) for w in whole],
        out_specs=[spec(r) for r in rows],
        out_shape=[jax.ShapeDtypeStruct((batch, r, n), tiled[0].dtype) for r in rows],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=vmem),
        interpret=interpret,
    )(*tiled, *whole)


def _column(x: Array) -> Array:
    return x.astype(jnp.float32)[:, None]


def forward(x: Array, weights: tuple[Array, ...], epsilon: float, save: bool, interpret: bool = False) -> list[Array]:
    """The layer on one device: tokens [B, C, N] -> [B, C, N] in their dtype, and with `save`, for the backward pass,
    the projection [B, 2H, N].

    N and H are multiples of LANES, C is at most the largest key of TILES. The weights are scale [C] and shift [C] of
    the norm, kernel [C, 2H] and bias [2H] of the projection (values, then gates), kernel [H, C] and bias [C] of the
    output; kernels have the dtype of x. `interpret` interprets the kernel on a CPU, for tests."""
    scale, shift, w_in, b_in, w_out, b_out = weights
    whole = [_column(scale), _column(shift), w_in.T, _column(b_in), w_out.T, _column(b_out)]
    rows = [x.shape[1], w_in.shape[1]]
    return _call(_forward_kernel, f"{FORWARD}{len(w_out)}", [x], whole, rows[: 1 + save], epsilon, interpret)


def backward(
    x: Array, projection: Array, dy: Array, weights: tuple[Array, ...], epsilon: float, interpret: bool = False
) -> Array:
    """Returns the gradient with respect to x, [B, C, N], for `dy` of the output and the projection of `forward`."""
    scale, _, w_in, _, w_out, _ = weights
    whole = [_column(scale), w_in, w_out]
    name = f"{BACKWARD}{len(w_out)}"
    return _call(_backward_kernel, name, [x, projection, dy], whole, [x.shape[1]], epsilon, interpret)[0]
