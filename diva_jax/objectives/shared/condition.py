"""The condition of the U-Net from image features: selection of tokens, and addition of the text.

DIVA, section 3.2, with the token counts and the text of the authors' code for each backbone.
"""

import jax
import jax.numpy as jnp

from diva_jax.common.errors import UserError
from diva_jax.models.backbones import Features

Array = jax.Array


def parse_select(select: str) -> tuple[str, int]:
    """Parses `Spec.select`: "all" -> ("all", 0), "none" -> ("none", 0), "random:76" -> ("random", 76)."""
    kind, _, count = select.partition(":")
    return kind, int(count or 0)


def token_count(select: str, patches: int) -> int:
    """Returns the number of tokens in the condition, including the pooled token."""
    kind, k = parse_select(select)
    return 1 + {"all": patches, "none": 0, "random": k, "runs": patches // max(k, 1)}[kind]


def draw_token_indices(keys: Array, select: str, patches: int) -> Array | None:
    """Draws patch indices [B, K], int32, uniform with replacement, from one key per image [B]; None unless random."""
    kind, k = parse_select(select)
    if kind != "random":
        return None
    return jax.vmap(lambda key: jax.random.randint(key, (k,), 0, patches))(keys)


def select_tokens(features: Features, select: str, indices: Array | None = None) -> Array:
    """Selects the features that condition the U-Net, with the pooled token first.

    Args:
      features: tokens [B, P, D], pooled [B, D].
      select: as in `Spec.select`.
      indices: [B, K] if `select` is random.

    Returns:
      [B, n, D], where n is `token_count`.
    """
    kind, k = parse_select(select)
    tokens = features.tokens
    if kind == "random":
        tokens = jnp.take_along_axis(tokens, indices[:, :, None], axis=1)
    elif kind == "none":
        tokens = tokens[:, :0]
    elif kind == "runs":
        b, p, d = tokens.shape
        tokens = tokens[:, : p // k * k].reshape(b, p // k, k, d).mean(axis=2)
    return jnp.concatenate([features.pooled[:, None], tokens], axis=1)


def add_text(projected: Array, text: Array, how: str) -> Array:
    """Computes the condition of the U-Net.

    Args:
      projected: [B, n, C], the features after `visual_proj`.
      text: [1, T, C], the prompt's last hidden state.
      how: "token" (n == T) or "mean" (the mean over T, added to each token).

    Returns:
      [B, n, C].
    """
    if how == "mean":
        text = text.mean(axis=1, keepdims=True)
    return projected + text.astype(projected.dtype)


def check_fit(select: str, how: str, patches: int, text_tokens: int) -> None:
    """Checks that features and text can be added.

    Raises:
      UserError: the numbers of tokens differ.
    """
    n = token_count(select, patches)
    if how == "token" and n != text_tokens:
        raise UserError(
            f"backbone.add_text=token needs as many feature tokens as text tokens, but "
            f"backbone.select={select} gives {n} and the prompt {text_tokens}: use add_text=mean or "
            f"select=random:{text_tokens - 1}"
        )
