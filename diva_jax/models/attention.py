"""Softmax attention: a flash kernel for long sequences on TPUs, cuDNN's on GPUs, one of our own on CPUs.

Shorter sequences, masks, and dtypes that these kernels do not take have XLA's operations. On TPUs where our kernel may
not be used, sequences whose scores would take most of the time, or not fit into HBM, have jax's splash attention. The
choice is made while a function is traced, by the platform that it is traced for (`platform.py`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diva_jax.costs import chips
from diva_jax.models.platform import LANES, Array, allowed, by_device, tile, traced_for

# Smallest number of queries for which the kernel is used, for self-attention and for cross-attention. With fewer
# queries, the scores fit into VMEM and XLA's fused softmax is not limited by HBM bandwidth.
KERNEL_FROM = {"self": 512, "cross": 4096}
SPLASH_FROM = 1024  # Smallest number of queries and of keys for jax's kernel, where ours may not be used.
# Largest head dim -> largest number of queries and of keys per tile. The float32 scores and sums of a tile must fit
# into VMEM.
MAX_BLOCK = {128: 1024, 512: 512}
CUDNN_WIDTH = 128  # Largest head dim of cuDNN's kernel on all GPUs that have it.


def kernel_of(n: int, m: int, width: int, batch: int, mesh) -> Callable | None:
    """The kernel of attention without a mask, n queries, m keys, the head dim `width`, traced for the abstract mesh
    `mesh`; None where it uses XLA's operations."""
    if traced_for(mesh) != "tpu" or batch % mesh.size or width > max(MAX_BLOCK):
        return None
    if n < KERNEL_FROM["self" if n == m else "cross"]:
        return None
    if allowed(f"attention {width}"):
        return flash
    return splash if min(n, m) >= SPLASH_FROM else None


def parts(shape: tuple[int, int, int], heads: int) -> int:
    """The number of parts in which a tower takes a batch, [B, N, D]: in each, XLA's operations keep the scores of
    self-attention in a TPU's VMEM (docs/PERFORMANCE.md, "Parts of a batch")."""
    (batch, n, width), mesh = shape, jax.sharding.get_abstract_mesh()
    chip = chips.of(mesh.abstract_device) if traced_for(mesh) == "tpu" else None
    if not chip or not chip.scores or batch % mesh.size or kernel_of(n, n, width // heads, batch, mesh):
        return 1
    images = batch // mesh.size
    most = max(1, chip.scores // (heads * n * (n + -n % LANES) * 4))
    return images // tile(images, most, 1)


def implementation(width: int, dtype, mesh) -> str | None:
    """Returns that of `jax.nn.dot_product_attention`: cuDNN's kernel, for 16 bits on GPUs, else None (XLA)."""
    fits = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and width <= CUDNN_WIDTH and width % 8 == 0
    return "cudnn" if fits and traced_for(mesh) == "gpu" else None


def block(n: int, width: int) -> int:
    """Returns the tile size for a sequence of length n, a multiple of LANES, and the head dim `width`."""
    return tile(n, next(most for limit, most in MAX_BLOCK.items() if width <= limit))


def _sequence_minor(x: Array) -> Array:
    """[B, N, H, D] -> [B, H*D, N'], N' the next multiple of LANES."""
    x = x.reshape(*x.shape[:2], -1).swapaxes(1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % LANES)))


def flash(q: Array, k: Array, v: Array, *, interpret: bool = False) -> Array:
    """Attention on one device with the kernel of `models/kernels.py`; shapes as in `attention`, [B, N, H, D].
    Sequences are padded to multiples of LANES; `interpret` interprets the kernel on a CPU, for tests."""
    from diva_jax.models import kernels

    (_, n, heads, width), m = q.shape, k.shape[1]
    padded = [_sequence_minor(x) for x in (q, k, v)]
    blocks = tuple(block(x.shape[2], width) for x in padded[:2])
    keys = m if padded[1].shape[2] != m else None
    return kernels.attend(*padded, heads, keys, blocks, interpret)[:, :, :n].swapaxes(1, 2).reshape(q.shape)


def splash(q: Array, k: Array, v: Array, *, interpret: bool = False) -> Array:
    """As `flash`, with jax's kernel, whose sequences are padded and masked here."""
    from jax.experimental.pallas.ops.tpu import splash_attention as kernel

    (n, heads, width), m = q.shape[1:], k.shape[1]
    padded = [
        jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % LANES), (0, 0))) for x in (q * width**-0.5, k, v)
    ]
    queries, keys = (x.shape[2] for x in padded[:2])
    tiles, layout = (block(queries, width), block(keys, width)), kernel.QKVLayout.SEQ_MINOR
    sizes = {f"block_{x}{of}": t for of in ("", "_dkv", "_dq") for x, t in zip(("q", "kv"), tiles, strict=True)}
    attend = kernel.make_splash_mha_single_device(
        kernel.MultiHeadMask([kernel.FullMask((queries, keys))] * heads),
        block_sizes=kernel.BlockSizes(**sizes, q_layout=layout, k_layout=layout, v_layout=layout),
        interpret=interpret,
    )
    # Queries attend to the keys of their own segment, which padded keys are not in.
    ids = kernel.SegmentIds(q=jnp.zeros(queries, jnp.int32), kv=(jnp.arange(keys) >= m).astype(jnp.int32))
    return jax.vmap(lambda *one: attend(*one, segment_ids=None if keys == m else ids))(*padded)[:, :, :n].swapaxes(1, 2)


def _scores(q: Array, k: Array) -> Array:
    """[B, H, N, M], scaled."""
    return jnp.einsum("bnhd,bmhd->bhnm", q * q.shape[-1] ** -0.5, k)


def _forward(q: Array, k: Array, v: Array):
    scores = _scores(q, k)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, v) / total.swapaxes(1, 2), (q, k, v, largest, total)


def _backward(kept, g: Array):
    q, k, v, largest, total = kept
    # The logarithm of the total is not added to the largest score: its rounding would be a factor of all weights.
    weights = jnp.exp(_scores(q, k) - largest) * (1 / total)
    to_weights = jnp.einsum("bnhd,bmhd->bhnm", g, v)
    # The mean for each query. Where it is summed as the weights are, the gradient to a bias of the keys is zero up to
    # rounding, as it should be; the sum of output times gradient is the same with more rounding.
    mean = jnp.sum(weights * to_weights, axis=-1, keepdims=True)
    to_scores = weights * (to_weights - mean)
    scale = q.shape[-1] ** -0.5
    return (
        jnp.einsum("bhnm,bmhd->bnhd", to_scores, k) * scale,
        jnp.einsum("bhnm,bnhd->bmhd", to_scores, q) * scale,
        jnp.einsum("bhnm,bnhd->bmhd", weights, g),
    )


@jax.custom_vjp
def _recomputed(q: Array, k: Array, v: Array) -> Array:
    """Attention on CPUs, [B, N, H, D], whose backward pass computes the weights again (arXiv 2205.14135, section 3.1;
    docs/PERFORMANCE.md, "CPU beside PyTorch")."""
    return _forward(q, k, v)[0]


_recomputed.defvjp(_forward, _backward)


@jax.named_scope("attention")
def attention(q: Array, k: Array, v: Array, *, causal: bool = False, mask: Array | None = None) -> Array:
    """Softmax attention with scores scaled by 1 / sqrt(D) (arXiv 1706.03762, equation 1). Queries [B, N, H, D], keys
    and values [B, M, H, D] -> [B, N, H*D], in the dtype of q. `causal`: query n attends to keys 0..n only; `mask`, bool
    [B, 1 | H, N, M], is true where a query attends to a key."""
    mesh = jax.sharding.get_abstract_mesh()
    full = not causal and mask is None
    kernel = kernel_of(q.shape[1], k.shape[1], q.shape[3], q.shape[0], mesh) if full else None
    if full and q.dtype.itemsize >= 4 and traced_for(mesh) == "cpu":
        out = _recomputed(q, k, v)
    elif kernel:
        out = by_device(kernel, q, k, v)
    else:
        fused = implementation(q.shape[3], q.dtype, mesh)
        out = jax.nn.dot_product_attention(q, k, v, is_causal=causal, mask=mask, implementation=fused)
    return out.reshape(*out.shape[:-2], -1)
