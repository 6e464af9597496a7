"""DCR's contrastive loss between predictions of the same latents under different conditions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Contrast(NamedTuple):
    """The loss of each image and its logits.

    Attributes:
      losses: [B, 2], minus the logarithm of each positive's share, plus and target; the loss is the mean of all.
      others: [B, g], the logits of all conditions of the group.
      plus, target: [B], the logits of the positives.
    """

    losses: Array
    others: Array
    plus: Array
    target: Array


def contrast(predicted: Array, goal: Array, anchors: Array, temperature: float) -> Contrast:
    """The contrastive loss of B images.

    Args:
      predicted: [B, g + 1, h, w, c], under the conditions of the group in order, then under the plus condition.
      goal: [B, h, w, c].
      anchors: [B], the index of each image in its group.
      temperature: tau.
    """

    def unit(x):
        flat = x.reshape(*x.shape[:-3], -1)
        # The square root has no derivative at zero.
        square = jnp.sum(flat * flat, axis=-1, keepdims=True)
        return flat / jnp.maximum(jnp.sqrt(jnp.maximum(square, jnp.finfo(flat.dtype).tiny)), 1e-12)

    shares = unit(predicted)
    anchor = jnp.take_along_axis(shares, anchors[:, None, None], axis=1)  # [B, 1, n]
    logits = jnp.sum(anchor * shares, axis=-1) / temperature  # [B, g + 1]
    target = jnp.sum(anchor[:, 0] * unit(goal), axis=-1) / temperature
    others, plus = logits[:, :-1], logits[:, -1]
    every = jnp.concatenate([logits, target[:, None]], axis=1)
    z = jax.nn.logsumexp(every, axis=1, where=jnp.arange(every.shape[1]) != anchors[:, None])
    return Contrast(jnp.stack([z - plus, z - target], axis=1), others, plus, target)
