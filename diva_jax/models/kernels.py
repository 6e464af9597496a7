"""Pallas kernels for TPUs; this module is imported where they are traced, since Pallas takes 50 ms.

Softmax attention does not write scores to HBM (FlashAttention, arXiv 2205.14135). Queries, keys, values, the output and
all gradients are [B, H*D, N], the layout that XLA gives to tokens around attention; a head dim of 64 as the minor axis
would be padded to 128. Scores are [keys, queries]: the statistics of queries are rows, reduced over the register's
sublanes. In one of the two products of the forward pass and three of the five of the backward pass, the head dim is the
number of rows that stream through the matrix unit, so that 64 does not leave half of it idle. The backward pass is one
kernel, which keeps the gradient of the queries on the chip (FlashAttention-2, arXiv 2307.08691, algorithm 2). Where the
norms of queries and keys bound all scores of a tile, the forward pass searches for no maximum.

The residual feed-forward layer of a transformer block is norm, GEGLU and sum in one pass over tokens [B, C, N]. A tile
of them and the weights stay in VMEM from the LayerNorm to the residual sum, and the products of one part of the hidden
units overlap with the vector operations of another, which in XLA take longer than the products. The rows of the weights
stream through the matrix unit, so that a result of 320 channels does not occupy it as 384 would.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from diva_jax.models.layers import geglu_gradient, normal_cdf
from diva_jax.models.platform import LANES, Array, dot, tile

# Names of the kernels in compiled programs, followed by the head dim or by the number of hidden units; costs/hlo.py
# counts their FLOPs by these names.
FORWARD, BACKWARD = "flash_forward_d", "flash_backward_d"
FEED_FORWARD, FEED_BACKWARD = "feed_forward_forward_h", "feed_forward_backward_h"
# Scores up to this size need no maximum subtracted before `exp`: exp(60), summed over keys and times values, is far
# from the ends of float32 and of bfloat16, and so is exp(-60). float16 has a narrower range.
BOUNDED_SCORE = 60.0
_NEVER = -0.7 * float(jnp.finfo(jnp.float32).max)  # Score of a padded key.
_NT = (((1,), (1,)), ((), ()))  # x @ y.T
_TN = (((0,), (0,)), ((), ()))  # x.T @ y


def _scores(q: Array, k: Array, first, keys: int | None) -> Array:
    """[D, queries], [D, keys] -> [keys, queries]; the keys of this tile from index `keys` on are padding."""
    s = dot(k, q * k.shape[0] ** -0.5, _TN)
    if keys is None:
        return s
    return jnp.where(first + jax.lax.broadcasted_iota(jnp.int32, s.shape, 0) < keys, s, _NEVER)


def _largest_square(x: Array) -> Array:
    """The largest squared norm of the columns of [D, N]."""
    return jnp.max(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=0, keepdims=True))


def _forward_kernel(q_ref, k_ref, v_ref, o_ref, lse_ref, max_ref, sum_ref, acc_ref, *, keys):
    j, last = pl.program_id(3), pl.num_programs(3) - 1

    @pl.when(j == 0)
    def _():
        max_ref[...] = jnp.full_like(max_ref, _NEVER)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def add(s, largest):
        """Adds a tile of scores, of which `largest`, [1, queries] or a number, or what was larger, is subtracted."""
        before = max_ref[...]
        now = jnp.maximum(before, largest)
        p = jnp.exp(s - now)
        decay = jnp.exp(before - now)
        max_ref[...] = now
        sum_ref[...] = decay * sum_ref[...] + jnp.sum(p, axis=0, keepdims=True)
        acc_ref[...] = acc_ref[...] * decay + dot(v_ref[...], p.astype(v_ref.dtype))

    q, k = q_ref[...], k_ref[...]
    scores = functools.partial(_scores, q, k, j * k.shape[1], keys)
    # By the inequality of Cauchy and Schwarz no score of this tile is larger; a NaN is not bounded.
    limit = 0.0 if v_ref.dtype == jnp.float16 else q.shape[0] * BOUNDED_SCORE**2
    bounded = _largest_square(q) * _largest_square(k) <= limit

    @pl.when(bounded)
    def _():
        add(scores(), 0.0)

    if limit < float("inf"):  # bench/kernels.py counts the instructions of one way alone.

        @pl.when(jnp.logical_not(bounded))
        def _():
            s = scores()
            add(s, jnp.max(s, axis=0, keepdims=True))

    @pl.when(j == last)
    def _():
        o_ref[...] = (acc_ref[...] / sum_ref[...]).astype(o_ref.dtype)
        lse_ref[...] = max_ref[...] + jnp.log(sum_ref[...])


def _backward_kernel(
    q_ref, k_ref, v_ref, o_ref, do_ref, lse_ref, dq_ref, dk_ref, dv_ref, dq_acc, dk_acc, dv_acc, *, keys
):
    j, i = pl.program_id(2), pl.program_id(3)
    last_j, last_i = pl.num_programs(2) - 1, pl.num_programs(3) - 1
    queries = pl.ds(pl.multiple_of(i * q_ref.shape[1], LANES), q_ref.shape[1])

    @pl.when(i == 0)
    def _():
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    @pl.when(j == 0)
    def _():
        dq_acc[:, queries] = jnp.zeros(q_ref.shape, jnp.float32)

    q, k, v, do = q_ref[...], k_ref[...], v_ref[...], do_ref[...]
    p = jnp.exp(_scores(q, k, j * k.shape[1], keys) - lse_ref[...])
    dv_acc[...] += dot(do, p.astype(do.dtype), _NT)
    row = jnp.sum(o_ref[...].astype(jnp.float32) * do.astype(jnp.float32), axis=0, keepdims=True)
    ds = (p * (dot(v, do, _TN) - row)).astype(q.dtype)
    dk_acc[...] += dot(q, ds, _NT)
    dq_acc[:, queries] += dot(k, ds)

    @pl.when(i == last_i)
    def _():
        dk_ref[...] = (dk_acc[...] * q.shape[0] ** -0.5).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)

    @pl.when(j == last_j)
    def _():
        dq_ref[:, queries] = (dq_acc[:, queries] * q.shape[0] ** -0.5).astype(dq_ref.dtype)


def _call(kernel, name: str, width: int, keys, interpret: bool, semantics, **kw):
    return pl.pallas_call(
        functools.partial(kernel, keys=keys),
        name=f"{name}{width}",
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        interpret=interpret,
        **kw,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def attend(
    q: Array, k: Array, v: Array, heads: int, keys: int | None, blocks: tuple[int, int], interpret: bool
) -> Array:
    """Attention on one device: queries [B, H*D, N], keys and values [B, H*D, M] -> [B, H*D, N], in the dtype of q.

    `keys` is the number of keys before the padding, None if there is none; `blocks` the queries and keys per tile,
    multiples of LANES that divide N and M. `interpret` interprets the kernels on a CPU, for tests."""
    return _forward(q, k, v, heads, keys, blocks, interpret)[0]


def _specs(width: int, blocks: tuple[int, int], place: Callable) -> tuple[pl.BlockSpec, ...]:
    """Tiles of queries, of keys, and of one number per query; `place` maps the last two indices of the grid to them."""
    bq, bk = blocks
    return (
        pl.BlockSpec((None, width, bq), lambda b, h, x, y: (b, h, place(x, y)[0])),
        pl.BlockSpec((None, width, bk), lambda b, h, x, y: (b, h, place(x, y)[1])),
        pl.BlockSpec((None, None, 1, bq), lambda b, h, x, y: (b, h, 0, place(x, y)[0])),
    )


def _forward(q, k, v, heads, keys, blocks, interpret):
    (b, c, n), m = q.shape, k.shape[2]
    width, (bq, bk) = c // heads, blocks
    by_q, by_k, row = _specs(width, blocks, lambda i, j: (i, j))
    o, lse = _call(
        _forward_kernel, FORWARD, width, keys, interpret, ("parallel", "parallel", "parallel", "arbitrary"),
        grid=(b, heads, n // bq, m // bk),
        in_specs=[by_q, by_k, by_k],
        out_specs=[by_q, row],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, heads, 1, n), jnp.float32)],
        scratch_shapes=[pltpu.VMEM((rows, bq), jnp.float32) for rows in (1, 1, width)],
    )(q, k, v)  # fmt: skip
    return o, (q, k, v, o, lse)


def _backward(heads, keys, blocks, interpret, saved, do):
    q, k, v, o, lse = saved
    (b, c, n), m = q.shape, k.shape[2]
    width, (bq, bk) = c // heads, blocks
    by_q, by_k, row = _specs(width, blocks, lambda j, i: (i, j))
    return _call(
        _backward_kernel, BACKWARD, width, keys, interpret, ("parallel", "parallel", "arbitrary", "arbitrary"),
        grid=(b, heads, m // bk, n // bq),
        in_specs=[by_q, by_k, by_k, by_q, by_q, row],
        out_specs=[pl.BlockSpec((None, width, n), lambda b, h, j, i: (b, h, 0)), by_k, by_k],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
        scratch_shapes=[pltpu.VMEM((width, length), jnp.float32) for length in (n, bk, bk)],
    )(q, k, v, o, do, lse)  # fmt: skip


attend.defvjp(_forward, _backward)


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


def _feed_forward_kernel(x_ref, scale_ref, shift_ref, w_in_ref, b_in_ref, w_out_ref, b_out_ref, y_ref, *saved, epsilon):
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


def _feed_backward_kernel(x_ref, h_ref, dy_ref, scale_ref, w_in_ref, w_out_ref, dx_ref, *, epsilon):
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


def _each(kernel, name: str, tiled: list[Array], whole: list[Array], rows: list[int], epsilon: float, interpret: bool):
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


def feed_forward(
    x: Array, weights: tuple[Array, ...], epsilon: float, save: bool, interpret: bool = False
) -> list[Array]:
    """The layer on one device: tokens [B, C, N] -> [B, C, N] in their dtype, and with `save`, for the backward pass,
    the projection [B, 2H, N].

    N and H are multiples of LANES, C is at most the largest key of TILES. The weights are scale [C] and shift [C] of
    the norm, kernel [C, 2H] and bias [2H] of the projection (values, then gates), kernel [H, C] and bias [C] of the
    output; kernels have the dtype of x. `interpret` interprets the kernel on a CPU, for tests."""
    scale, shift, w_in, b_in, w_out, b_out = weights
    whole = [_column(scale), _column(shift), w_in.T, _column(b_in), w_out.T, _column(b_out)]
    rows = [x.shape[1], w_in.shape[1]]
    return _each(_feed_forward_kernel, f"{FEED_FORWARD}{len(w_out)}", [x], whole, rows[: 1 + save], epsilon, interpret)


def feed_backward(
    x: Array, projection: Array, dy: Array, weights: tuple[Array, ...], epsilon: float, interpret: bool = False
) -> Array:
    """The gradient with respect to x, [B, C, N], for `dy` of the output and the projection of `feed_forward`."""
    scale, _, w_in, _, w_out, _ = weights
    whole = [_column(scale), w_in, w_out]
    name = f"{FEED_BACKWARD}{len(w_out)}"
    return _each(_feed_backward_kernel, name, [x, projection, dy], whole, [x.shape[1]], epsilon, interpret)[0]
