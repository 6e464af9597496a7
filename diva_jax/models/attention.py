"""Softmax attention: a flash kernel for long sequences on TPUs, plain XLA everywhere else.

Which of the two is decided while a function is traced, from the mesh that it is traced for (`jax.sharding`'s
abstract mesh) and not from the machine at hand, so that a step compiled on a CPU for a TPU is the TPU's step.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec as P

Array = jax.Array

# Queries from which the kernel is used, self-attention and attention to another sequence apart: below, the
# scores fit into the TPU's fast memory and XLA's fused softmax does not wait for HBM.
KERNEL_FROM = {"self": 512, "cross": 4096}
# Keys and queries of one tile, for heads up to a width: its scores and sums, in float32, must fit into VMEM.
MAX_BLOCK = {128: 1024, 512: 512}
LANES = 128  # Every tile is a multiple of a vector register's lanes.


def use_kernel(queries: int, keys: int, width: int, batch: int, mesh) -> bool:
    """Whether attention of these sizes, traced for `mesh`, runs in the kernel.

    Args:
      queries, keys: sequence lengths.
      width: of a head.
      batch: images, over all devices of the mesh.
      mesh: an abstract mesh, empty where none was set.
    """
    device = None if mesh.empty else mesh.abstract_device
    if device is None or device.platform != "tpu" or batch % mesh.size or width > max(MAX_BLOCK):
        return False
    return queries >= KERNEL_FROM["self" if queries == keys else "cross"]


def block(n: int, width: int) -> int:
    """The tile for a sequence of n, a multiple of LANES: its largest divisor that is one too, up to MAX_BLOCK."""
    most = next(most for limit, most in MAX_BLOCK.items() if width <= limit)
    return max(b for b in range(LANES, most + 1, LANES) if n % b == 0)


def _padded(x: Array) -> Array:
    """[B, N, H, D] -> [B, H, N', D], N' the next multiple of LANES."""
    x = x.swapaxes(1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % LANES), (0, 0)))


def flash(q: Array, k: Array, v: Array, *, interpret: bool = False) -> Array:
    """Attention in which no score reaches HBM, forward or backward (arXiv 2205.14135; JAX's splash kernel).

    Args:
      q: [B, N, H, D]. k, v: [B, M, H, D]. On this device; any lengths (padded to LANES, and the padding
        masked), D up to the widest in MAX_BLOCK.
      interpret: run the kernel's program on a CPU, for tests.

    Returns:
      [B, N, H, D], in q's dtype.
    """
    n, m = q.shape[1], k.shape[1]
    q, k, v = _padded(q * q.shape[-1] ** -0.5), _padded(k), _padded(v)
    (h, pn), pm = q.shape[1:3], k.shape[2]
    bq, bk = block(pn, q.shape[-1]), block(pm, q.shape[-1])
    # Sequence-minor: with heads of 64, the other layout would fill half of every lane with padding in HBM.
    layout = splash.QKVLayout.SEQ_MINOR
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.FullMask((pn, pm))] * h),
        block_sizes=splash.BlockSizes(
            block_q=bq, block_kv=bk, block_q_dkv=bq, block_kv_dkv=bk, block_q_dq=bq, block_kv_dq=bk,
            q_layout=layout, k_layout=layout, v_layout=layout,
        ),
        interpret=interpret,
    )  # fmt: skip
    ids = None
    if (pn, pm) != (n, m):
        # Queries see the keys of their own segment; a padded query may see anything, its row is cut off below.
        ids = splash.SegmentIds(q=jnp.zeros(pn, jnp.int32), kv=(jnp.arange(pm) >= m).astype(jnp.int32))
    out = jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=ids))(q, k, v)
    return out[:, :, :n].swapaxes(1, 2)


def _float64(q: Array, k: Array, v: Array, causal: bool, mask: Array | None) -> Array:
    """For checks by finite differences: the library's softmax is in float32 whatever it is given."""
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    if causal:
        scores = jnp.where(jnp.tri(*scores.shape[-2:], dtype=bool), scores, -jnp.inf)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(scores), v)


@jax.named_scope("attention")
def attention(q: Array, k: Array, v: Array, *, causal: bool = False, mask: Array | None = None) -> Array:
    """Softmax attention, scores scaled by 1/sqrt(D).

    Args:
      q: [B, N, H, D]. k, v: [B, M, H, D].
      causal: query n sees keys 0..n only.
      mask: bool [B, 1 | H, N, M], true where a query may look.

    Returns:
      [B, N, H*D], in q's dtype.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if q.dtype == jnp.float64:
        out = _float64(q, k, v, causal, mask)
    elif not causal and mask is None and use_kernel(q.shape[1], k.shape[1], q.shape[3], q.shape[0], mesh):
        batch = P(mesh.axis_names)
        # XLA cannot split a kernel over devices: each one runs it on its own images.
        out = jax.shard_map(flash, in_specs=(batch,) * 3, out_specs=batch, check_vma=False)(q, k, v)
    else:
        out = jax.nn.dot_product_attention(q, k, v, is_causal=causal, mask=mask)
    return out.reshape(*out.shape[:-2], -1)
