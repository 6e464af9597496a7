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
    """Features that condition the U-Net, pooled token first, [B, `token_count`, D]; `indices` [B, K] if drawn."""
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
    """The condition of the U-Net, [B, n, C], from features after `visual_proj` and the prompt's states, [1, T, C].

    With `how` "token" (n == T) they are added token by token, with "mean" the states' mean to each token.
    """
    if how == "mean":
        text = text.mean(axis=1, keepdims=True)
    return projected + text.astype(projected.dtype)


def check_fit(select: str, how: str, patches: int, text_tokens: int) -> None:
    """Raises a UserError where features and text are added token by token and their numbers differ."""
    n = token_count(select, patches)
    if how == "token" and n != text_tokens:
        raise UserError(
            f"backbone.add_text=token needs as many feature tokens as text tokens, but "
            f"backbone.select={select} gives {n} and the prompt {text_tokens}: use add_text=mean or "
            f"select=random:{text_tokens - 1}"
        )
