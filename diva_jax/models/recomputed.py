"""Attention whose backward pass computes the attention weights again (FlashAttention, arXiv 2205.14135), for CPUs.

XLA's gradient of `jax.nn.dot_product_attention` keeps the scores and the weights, and passes over them several times
(docs/PERFORMANCE.md, "CPU beside PyTorch").
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
    return out, (q, k, v, largest, total)


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
def attend(q: Array, k: Array, v: Array) -> Array:
    """Softmax attention without a mask, as in `attention.attention`: [B, N, H, D], float32 or float64."""
    return _forward(q, k, v)[0]


attend.defvjp(_forward, _backward)
