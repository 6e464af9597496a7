"""Softmax attention as a Pallas kernel for TPUs that does not write scores to HBM (FlashAttention, arXiv 2205.14135).

Queries, keys, values, the output and all gradients have the layout of the projections around attention, [B, N, H*D], so
that nothing is transposed or padded in HBM: a block has the channels of a few whole heads. The backward pass is one kernel
with five products per tile, which keeps the gradient of the queries on the chip (FlashAttention-2, arXiv 2307.08691,
algorithm 2).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Array = jax.Array

LANES = 128  # Tiles are multiples of the number of lanes of a vector register.
# Names of the kernels in compiled programs, followed by the head dim; costs/hlo.py counts their FLOPs by these names.
FORWARD, BACKWARD = "flash_forward_d", "flash_backward_d"
_NEVER = -0.7 * float(jnp.finfo(jnp.float32).max)  # Score of a padded key.
_NT = (((1,), (1,)), ((), ()))  # x @ y.T
_NN = (((1,), (0,)), ((), ()))  # x @ y
_TN = (((0,), (0,)), ((), ()))  # x.T @ y


def together(heads: int, width: int) -> int:
    """Returns how many heads share a block: the fewest whose channels are whole registers, or all."""
    return min(math.lcm(width, LANES) // width, heads)


def _dot(x: Array, y: Array, dims) -> Array:
    # float32 inputs, as in tests, are multiplied in float32.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def _each_head(heads: int, width: int, group, body) -> None:
    """Runs body(h, slice of the block's channels) for each head of the block with index `group`."""
    count = together(heads, width)
    for h in range(count):
        run = functools.partial(body, h, slice(h * width, (h + 1) * width))
        if heads % count:  # The last block has fewer heads.
            pl.when(group * count + h < heads)(run)
        else:
            run()


def _forward_kernel(q_ref, k_ref, v_ref, o_ref, lse_ref, max_ref, sum_ref, acc_ref, *, heads, width, keys):
    group, j, last = pl.program_id(1), pl.program_id(3), pl.num_programs(3) - 1
    block = k_ref.shape[0]

    @pl.when(j == 0)
    def _():
        max_ref[...] = jnp.full_like(max_ref, _NEVER)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def head(h, lanes):
        q = q_ref[:, lanes] * width**-0.5
        s = _dot(q, k_ref[:, lanes], _NT)  # [queries, keys]
        if keys is not None:
            s = jnp.where(j * block + jax.lax.broadcasted_iota(jnp.int32, s.shape, 1) < keys, s, _NEVER)
        before = max_ref[h]  # [queries, LANES], all columns equal.
        now = jnp.maximum(before, jnp.max(s, axis=1)[:, None])
        p = jnp.exp(s - jnp.tile(now, (1, block // LANES)))
        decay = jnp.exp(before - now)
        max_ref[h] = now
        sum_ref[h] = decay * sum_ref[h] + jnp.sum(p, axis=1)[:, None]
        v = v_ref[:, lanes]
        acc_ref[h] = acc_ref[h] * decay[:, :1] + _dot(p.astype(v.dtype), v, _NN)

    _each_head(heads, width, group, head)

    @pl.when(j == last)
    def _():
        def write(h, lanes):
            o_ref[:, lanes] = (acc_ref[h] / sum_ref[h][:, :1]).astype(o_ref.dtype)
            lse_ref[h : h + 1, :] = (max_ref[h] + jnp.log(sum_ref[h])).T[:1]

        _each_head(heads, width, group, write)


def _backward_kernel(
    q_ref, k_ref, v_ref, do_ref, lse_ref, di_ref, dq_ref, dk_ref, dv_ref, dq_acc, dk_acc, dv_acc, *, heads, width, keys
):
    group, j, i = (pl.program_id(axis) for axis in (1, 2, 3))
    last_j, last_i = pl.num_programs(2) - 1, pl.num_programs(3) - 1
    queries = pl.ds(i * q_ref.shape[0], q_ref.shape[0])

    @pl.when(i == 0)
    def _():
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    @pl.when(j == 0)
    def _():
        dq_acc[queries] = jnp.zeros_like(dq_acc[queries])

    def head(h, lanes):
        q, k, v, do = q_ref[:, lanes] * width**-0.5, k_ref[:, lanes], v_ref[:, lanes], do_ref[:, lanes]
        s = _dot(k, q, _NT)  # [keys, queries]
        if keys is not None:
            s = jnp.where(j * k.shape[0] + jax.lax.broadcasted_iota(jnp.int32, s.shape, 0) < keys, s, _NEVER)
        p = jnp.exp(s - lse_ref[h : h + 1, :])
        dv_acc[:, lanes] += _dot(p.astype(do.dtype), do, _NN)
        ds = (p * (_dot(v, do, _NT) - di_ref[h : h + 1, :])).astype(q.dtype)
        dk_acc[:, lanes] += _dot(ds, q, _NN)
        dq_acc[queries, lanes] += _dot(ds, k, _TN)

    _each_head(heads, width, group, head)

    @pl.when(i == last_i)
    def _():
        dk_ref[...] = dk_acc[...].astype(dk_ref.dtype)
        dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)

    @pl.when(j == last_j)
    def _():
        dq_ref[queries] = (dq_acc[queries] * width**-0.5).astype(dq_ref.dtype)


def _call(kernel, name, width, interpret, semantics, **kw):
    return pl.pallas_call(
        kernel,
        name=f"{name}{width}",
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        interpret=interpret,
        **kw,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def attend(q: Array, k: Array, v: Array, heads: int, keys: int | None, blocks: tuple[int, int], interpret: bool):
    """Attention of one device.

    Args:
      q: queries, [B, N, H*D].
      k, v: keys and values, [B, M, H*D].
      heads: H.
      keys: number of keys before the padding; None if there is none.
      blocks: queries and keys per tile: multiples of LANES that divide N and M.
      interpret: whether to interpret the kernels on a CPU, for tests.

    Returns:
      [B, N, H*D], in the dtype of q.
    """
    return _forward(q, k, v, heads, keys, blocks, interpret)[0]


def _forward(q, k, v, heads, keys, blocks, interpret):
    (b, n, c), m = q.shape, k.shape[1]
    width, (bq, bk) = c // heads, blocks
    count = together(heads, width)
    by_q = pl.BlockSpec((None, bq, count * width), lambda b, h, i, j: (b, i, h))
    by_k = pl.BlockSpec((None, bk, count * width), lambda b, h, i, j: (b, j, h))
    groups = -(-heads // count)
    stats = pl.BlockSpec((None, None, count, bq), lambda b, h, i, j: (b, h, 0, i))
    return _call(
        functools.partial(_forward_kernel, heads=heads, width=width, keys=keys),
        FORWARD, width, interpret, ("parallel", "parallel", "parallel", "arbitrary"),
        grid=(b, groups, n // bq, m // bk),
        in_specs=[by_q, by_k, by_k],
        out_specs=[by_q, stats],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, groups, count, n), jnp.float32)],
        scratch_shapes=[
            pltpu.VMEM((count, bq, LANES), jnp.float32),
            pltpu.VMEM((count, bq, LANES), jnp.float32),
            pltpu.VMEM((count, bq, width), jnp.float32),
        ],
    )(q, k, v)  # fmt: skip


def _forward_saved(q, k, v, heads, keys, blocks, interpret):
    o, lse = _forward(q, k, v, heads, keys, blocks, interpret)
    return o, (q, k, v, o, lse)


def _backward(heads, keys, blocks, interpret, saved, do):
    q, k, v, o, lse = saved
    (b, n, c), m = q.shape, k.shape[1]
    width, (bq, bk) = c // heads, blocks
    groups, count = lse.shape[1:3]
    di = (o.astype(jnp.float32) * do.astype(jnp.float32)).reshape(b, n, heads, width).sum(axis=-1).swapaxes(1, 2)
    di = jnp.pad(di, ((0, 0), (0, groups * count - heads), (0, 0))).reshape(lse.shape)
    by_q = pl.BlockSpec((None, bq, count * width), lambda b, h, j, i: (b, i, h))
    by_k = pl.BlockSpec((None, bk, count * width), lambda b, h, j, i: (b, j, h))
    all_q = pl.BlockSpec((None, n, count * width), lambda b, h, j, i: (b, 0, h))
    stats = pl.BlockSpec((None, None, count, bq), lambda b, h, j, i: (b, h, 0, i))
    return _call(
        functools.partial(_backward_kernel, heads=heads, width=width, keys=keys),
        BACKWARD, width, interpret, ("parallel", "parallel", "arbitrary", "arbitrary"),
        grid=(b, groups, m // bk, n // bq),
        in_specs=[by_q, by_k, by_k, by_q, stats, stats],
        out_specs=[all_q, by_k, by_k],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
        scratch_shapes=[
            pltpu.VMEM((n, count * width), jnp.float32),
            pltpu.VMEM((bk, count * width), jnp.float32),
            pltpu.VMEM((bk, count * width), jnp.float32),
        ],
    )(q, k, v, do, lse, di)  # fmt: skip


attend.defvjp(_forward_saved, _backward)
