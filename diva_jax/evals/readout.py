"""Readouts: the image embeddings from the tokens of a backbone with which scores were published."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diva_jax.common.errors import UserError
from diva_jax.models.backbones import Features

Array = jax.Array
_WHICH = r"all|random \d+"
_READOUT = re.compile(
    r"(?P<cls>pooled|cls|l2\(cls\))"
    rf"( \+ mean\(((?P<plain>{_WHICH})|l2\((?P<normed>{_WHICH})\))\))?"
    r"(?P<after>, l2)?"
)


class Readout(NamedTuple):
    """The computation of one image embedding from tokens. `l2_cls` normalises the pooled token first, `l2_patches` each
    patch token, `l2_after` the sum. `patches` is how many patch tokens are drawn (uniformly, with replacement) and
    averaged; 0: all; None: none."""

    l2_cls: bool
    patches: int | None
    l2_patches: bool
    l2_after: bool


def parse_readout(text: str) -> Readout:
    """Parses a readout such as `"l2(cls) + mean(l2(random 364))"`; "pooled" is "cls, l2". A UserError for others."""
    match = _READOUT.fullmatch(text)
    if not match:
        raise UserError(
            f"backbone.readout={text!r} cannot be read: write cls or l2(cls), then optionally + mean(TOKENS) with all, "
            "random K, l2(all) or l2(random K) as tokens, then optionally ', l2'"
        )
    which = match["plain"] or match["normed"]
    count = None if which is None else int(which.removeprefix("random ").replace("all", "0"))
    after = bool(match["after"]) or match["cls"] == "pooled"
    return Readout(match["cls"] == "l2(cls)", count, bool(match["normed"]), after)


def l2(x: Array) -> Array:
    """Scales [..., D] to length one."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def read_out(readout: Readout, features: Features, weights: Array | None) -> Array:
    """K embeddings per image, float32 [B, K, D], from tokens [B, P, D] and pooled [B, D]. `weights` are those of each
    patch in the mean, [B, K, P]; without patches they are None, and K is 1."""
    tokens, cls = (x.astype(jnp.float32) for x in features)
    out = (l2(cls) if readout.l2_cls else cls)[:, None]  # [B, 1, D]
    if readout.patches is not None:
        tokens = l2(tokens) if readout.l2_patches else tokens
        out = out + jnp.einsum("bkp,bpd->bkd", weights, tokens)
    return l2(out) if readout.l2_after else out


def patch_weights(readout: Readout, patches: int, rows: Sequence[int], seeds: int, seed: int) -> np.ndarray | None:
    """The weights of P patches in the mean, float32 [B, K, P], for the images of these B numbers, on which, with the
    seed, the draws alone depend. K is `seeds` where patches are drawn, else 1; None for a readout without patches."""
    if readout.patches is None:
        return None
    if not readout.patches:
        return np.full((len(rows), 1, patches), 1 / patches, np.float32)
    out = np.empty((len(rows), seeds, patches), np.float32)
    for row, drawn in zip(rows, out, strict=True):
        for k in range(seeds):
            indices = np.random.default_rng((seed, k, row)).integers(0, patches, readout.patches)
            drawn[k] = np.bincount(indices, minlength=patches) / readout.patches
    return out
