"""Losses over all pairs of a batch, each in float32 or wider."""

import jax
import jax.numpy as jnp

from diva_jax.models.layers import Array, widened


def unit(x: Array) -> Array:
    """Vectors [..., D], none of them zero, divided by their lengths."""
    x = widened(x)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True))


def cosines(x: Array, y: Array) -> Array:
    """The cosine of each of the vectors [B, D] with each of [C, D], [B, C]."""
    return jnp.matmul(unit(x), unit(y).T, precision=jax.lax.Precision.HIGHEST)


def contrast(logits: Array) -> Array:
    """The mean of the cross-entropies of the rows and of the columns of [B, B], in which the diagonal is right."""
    rows, columns = (-jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits, axis=a))) for a in (1, 0))
    return (rows + columns) / 2


def relation(x: Array, teacher: Array, temperature: float, with_self: bool = True) -> Array:
    """The mean over i of KL(softmax_j(cos(t_i, t_j) / temperature) || softmax_j(cos(x_i, x_j) / temperature)). The
    embeddings x [B, D] and t [B, D'] are of the same images; `with_self`: whether j = i takes part."""
    left_out = 0.0 if with_self else 1e9 * jnp.eye(len(x))
    ours, theirs = (jax.nn.log_softmax(cosines(e, e) / temperature - left_out) for e in (x, teacher))
    return jnp.mean(jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=1))
