"""Attention whose backward pass computes the attention weights again, for CPUs.

As in FlashAttention (arXiv 2205.14135, section 3.1), one number per query is kept for the backward pass, and not the
weights. XLA's code for the gradient of `jax.nn.dot_product_attention` keeps the scores and the weights, and passes over
them several times (docs/PERFORMANCE.md, "CPU beside PyTorch").
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def _scores(q: Array, k: Array) -> Array:
    """[B, H, N, M], scaled."""
    return jnp.einsum("bnhd,bmhd->bhnm", q * q.shape[-1] ** -0.5, k)


def _forward(q: Array, k: Array, v: Array):
    scores = _scores(q, k)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("bhnm,bmhd->bnhd", weights, v) / total.swapaxes(1, 2)
    return out, (q, k, v, out, largest + jnp.log(total))


def _backward(kept, g: Array):
    q, k, v, out, log_total = kept
    weights = jnp.exp(_scores(q, k) - log_total)
    # The sum over keys of weights times their gradients, for each query.
    mean = jnp.sum(out * g, axis=-1, keepdims=True).swapaxes(1, 2)
    to_scores = weights * (jnp.einsum("bnhd,bmhd->bhnm", g, v) - mean)
    scale = q.shape[-1] ** -0.5
    return (
        jnp.einsum("bhnm,bmhd->bnhd", to_scores, k) * scale,
        jnp.einsum("bhnm,bnhd->bmhd", to_scores, q) * scale,
        jnp.einsum("bhnm,bnhd->bmhd", weights, g),
    )


@jax.custom_vjp
def attend(q: Array, k: Array, v: Array) -> Array:
    """Softmax attention without a mask.

    Args:
      q: queries, [B, N, H, D], float32.
      k, v: keys and values, [B, M, H, D], float32.

    Returns:
      [B, N, H, D], float32.
    """
    return _forward(q, k, v)[0]


attend.defvjp(_forward, _backward)
