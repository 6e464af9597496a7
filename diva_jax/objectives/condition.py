"""From image features to the U-Net's condition: which tokens, and how the text is added.

DIVA, section 3.2, with the token counts and the text of the authors' code for each backbone.
"""

import jax
import jax.numpy as jnp

from diva_jax.common.errors import UserError
from diva_jax.models.backbones import Features

Array = jax.Array


def parse_select(select: str) -> tuple[str, int]:
    """`"all"` -> ("all", 0), `"random:76"` -> ("random", 76), `"runs:6"` -> ("runs", 6).

    Raises:
      UserError: any other text.
    """
    kind, _, count = select.partition(":")
    if (kind == "all" and not count) or (kind in ("random", "runs") and count.isdigit() and int(count) > 0):
        return kind, int(count or 0)
    raise UserError(f"backbone.select={select!r} is not known: use all, random:K or runs:K, K a count of patches")


def token_count(select: str, patches: int) -> int:
    """Tokens in the condition, the pooled one included."""
    kind, k = parse_select(select)
    return 1 + {"all": patches, "random": k, "runs": patches // max(k, 1)}[kind]


def draw_token_indices(keys: Array, select: str, patches: int) -> Array | None:
    """Patch indices [B, K], int32, uniform with replacement, from one key an image [B]; None unless random."""
    kind, k = parse_select(select)
    if kind != "random":
        return None
    return jax.vmap(lambda key: jax.random.randint(key, (k,), 0, patches))(keys)


def select_tokens(features: Features, select: str, indices: Array | None = None) -> Array:
    """The features that condition the U-Net, pooled token first.

    Args:
      features: tokens [B, P, D], pooled [B, D].
      select: as in `Spec.select`.
      indices: [B, K] where `select` is random.

    Returns:
      [B, n, D], n of `token_count`.
    """
    kind, k = parse_select(select)
    tokens = features.tokens
    if kind == "random":
        tokens = jnp.take_along_axis(tokens, indices[:, :, None], axis=1)
    elif kind == "runs":
        b, p, d = tokens.shape
        tokens = tokens[:, : p // k * k].reshape(b, p // k, k, d).mean(axis=2)
    return jnp.concatenate([features.pooled[:, None], tokens], axis=1)


def add_text(projected: Array, text: Array, how: str) -> Array:
    """The U-Net's condition.

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
    """Raises a UserError where features and text cannot be added."""
    n = token_count(select, patches)
    if how not in ("token", "mean"):
        raise UserError(f"backbone.add_text={how!r} is not known: use token or mean")
    if how == "token" and n != text_tokens:
        raise UserError(
            f"backbone.add_text=token needs as many feature tokens as text tokens, but "
            f"backbone.select={select} gives {n} and the prompt {text_tokens}: use add_text=mean or "
            f"select=random:{text_tokens - 1}"
        )
