"""Softmax attention as a Pallas kernel for TPUs that does not write scores to HBM (FlashAttention, arXiv 2205.14135).

Queries, keys, values, the output and all gradients are [B, H*D, N], the layout that XLA gives to tokens around
attention; a head dim of 64 as the minor axis would be padded to 128. Scores are [keys, queries]: the statistics of
queries are rows, reduced over the register's sublanes. In one of the two products of the forward pass and three of the
five of the backward pass, the head dim is the number of rows that stream through the matrix unit, so that 64 does not
leave half of it idle. The backward pass is one kernel, which keeps the gradient of the queries on the chip
(FlashAttention-2, arXiv 2307.08691, algorithm 2). Where the norms of queries and keys bound all scores of a tile, the
forward pass searches for no maximum.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from diva_jax.models.platform import LANES, dot

Array = jax.Array

# Names of the kernels in compiled programs, followed by the head dim; costs/hlo.py counts their FLOPs by these names.
FORWARD, BACKWARD = "flash_forward_d", "flash_backward_d"
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
    return _call(
        _forward_kernel, FORWARD, width, keys, interpret, ("parallel", "parallel", "parallel", "arbitrary"),
        grid=(b, heads, n // bq, m // bk),
        in_specs=[by_q, by_k, by_k],
        out_specs=[by_q, row],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, heads, 1, n), jnp.float32)],
        scratch_shapes=[pltpu.VMEM((rows, bq), jnp.float32) for rows in (1, 1, width)],
    )(q, k, v)  # fmt: skip


def _forward_saved(q, k, v, heads, keys, blocks, interpret):
    o, lse = _forward(q, k, v, heads, keys, blocks, interpret)
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


attend.defvjp(_forward_saved, _backward)
