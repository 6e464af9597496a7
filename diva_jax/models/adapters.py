"""Low-rank adapters (LoRA, arXiv 2106.09685) over any linear layer, fused projections included.

An adapted layer computes `y = W x + b + (alpha / rank) B A drop(x)` (section 4.1). `A` is drawn uniformly from
+-1/sqrt(n_in) and `B` is zero, so that an adapted model starts as the model itself. A fused projection to queries, keys
and values has one pair of matrices, and one dropout mask, for each of its parts. The layer keeps the names of its own
parameters and adds `lora/a` and `lora/b`.
"""

import contextlib
import contextvars
import dataclasses
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from diva_jax.common.errors import UserError, listing
from diva_jax.common.fields import REGEX, Rule, above, at_least, below, field
from diva_jax.models.layers import Array, Matrix

# Layers whose outputs are several projections, one after the other, by the last component of their path.
FUSED = ("qkv", "kv")
FRESH = r"(.*/)?lora/[ab]"  # Names of the adapters' own parameters: no checkpoint of the model has them.
# All linear layers of a transformer's blocks; with them what published methods adapt, by architecture: the projection
# of the pooled token, or the MLP of the pooling head, whose output layer is treated apart.
BLOCKS = r"blocks/\d+/(attn/(qkv|proj)|mlp/fc[12])"
TARGETS = {"vit": rf"{BLOCKS}|proj", "siglip": rf"{BLOCKS}|attn_pool/mlp/fc[12]"}
SIGLIP_HEAD = "attn_pool/proj"

DROPOUT: contextvars.ContextVar[Array | None] = contextvars.ContextVar("dropout", default=None)


@dataclasses.dataclass(frozen=True)
class Lora:
    """How a model is adapted."""

    rank: int = field(16, "The rank of each layer's update.", at_least(1))
    alpha: float = field(16.0, "The update is scaled by alpha / rank.", above(0))
    dropout: float = field(0.0, "The share of an adapter's input that is dropped in training.", below(0, 1))
    targets: str = field(
        BLOCKS,
        "The layers whose path in the model, e.g. blocks/3/mlp/fc1, matches this regular expression are adapted.",
        REGEX,
    )
    fused: str = field(
        "qkv",
        "The parts of a fused projection that are adapted, as letters.",
        Rule(lambda v: v and set(v) <= set("qkv"), "must be one or more of the letters q, k, v"),
    )
    biases: bool = field(False, "Whether the biases of adapted layers are trained too.")

    def trainable(self, prefix: str) -> tuple[tuple[str, float], ...]:
        """Rows of `config.trainable` for a model whose parameters are named `prefix/...`."""
        leaves = "(lora/[ab]|bias)" if self.biases else "lora/[ab]"
        return ((f"{prefix}/({self.targets})/{leaves}", 1.0),)


@contextlib.contextmanager
def dropout(keys: Array | None) -> Iterator[None]:
    """Adapters drop elements of their inputs, [B, ...], where a model is called, or traced, in this context. `keys` are
    PRNG keys, one per image, [B], None: no dropout; an image's masks depend on its key and on the layer alone."""
    token = DROPOUT.set(keys)
    try:
        yield
    finally:
        DROPOUT.reset(token)


class Update(nnx.Module):
    """The low-rank update of one layer: `a` [parts, n_in, rank] and `b` [parts, rank, n_out / width]. The layer's
    outputs are `width` projections, of which those with the indices `parts` are adapted. `index`, of the layer in its
    model, decides its dropout masks."""

    def __init__(self, n_in: int, n_out: int, lora: Lora, width: int, parts: tuple[int, ...], index: int, rngs):
        self.scale, self.drop = lora.alpha / lora.rank, lora.dropout
        self.width, self.parts, self.index = width, parts, index
        bound = n_in**-0.5
        a = jax.random.uniform(rngs.params(), (len(parts), n_in, lora.rank), jnp.float32, -bound, bound)
        self.a = nnx.Param(a)
        self.b = nnx.Param(jnp.zeros((len(parts), lora.rank, n_out // width), jnp.float32))

    def _joined(self, parts: Array) -> Array:
        """[parts, ..., n_out / width] -> [..., n_out], zero for the parts that are not adapted."""
        found = dict(zip(self.parts, parts, strict=True))
        return jnp.concatenate([found.get(i, jnp.zeros_like(parts[0])) for i in range(self.width)], axis=-1)

    def _dropped(self, x: Array, keys: Array) -> Array:
        """[B, ..., n_in] -> [parts, B, ..., n_in]: each part has a mask of its own."""
        keep, shape = 1 - self.drop, (len(self.parts), *x.shape[1:])
        draw = lambda key: jax.random.bernoulli(jax.random.fold_in(key, self.index), keep, shape)  # noqa: E731
        return jnp.where(jnp.moveaxis(jax.vmap(draw)(keys), 1, 0), x / jnp.asarray(keep, x.dtype), 0)

    def __call__(self, x: Array) -> Array:
        """(alpha / rank) B A drop(x), [..., n_in] -> [..., n_out]."""
        keys = DROPOUT.get()
        drops = self.drop > 0 and keys is not None
        x = self._dropped(x, keys) if drops else jnp.broadcast_to(x, (len(self.parts), *x.shape))
        a, b = self.a[...].astype(x.dtype), self.b[...].astype(x.dtype)
        return self._joined(jnp.einsum("p...i,pir,pro->p...o", x, a, b)) * jnp.asarray(self.scale, x.dtype)

    def merged(self, weight: Array) -> Array:
        """W + (alpha / rank) A B, [n_in, n_out], in float32. The products are summed over the rank one after the other,
        so that the result does not depend on how the arrays are sharded."""

        def add(total, pair):
            column, row = pair  # [parts, n_in], [parts, n_out / width]
            return total + column[:, :, None] * row[:, None, :], None

        a, b = self.a[...].astype(jnp.float32), self.b[...].astype(jnp.float32)
        zeros = jnp.zeros((len(self.parts), a.shape[1], b.shape[2]), jnp.float32)
        product, _ = jax.lax.scan(add, zeros, (jnp.moveaxis(a, 2, 0), jnp.moveaxis(b, 1, 0)))
        return weight.astype(jnp.float32) + self.scale * self._joined(product)


def _adapted(kind: type[nnx.Module]) -> type[nnx.Module]:
    """The class of a layer whose calls add that of its update, `lora`."""

    class Adapted(kind):
        def __call__(self, x: Array) -> Array:
            y = super().__call__(x)
            return y + self.lora(x.astype(y.dtype))

    return Adapted


# Layer that can be adapted -> (its adapted form, the attribute of its weight [n_in, n_out]); and the other way round.
_KINDS = {nnx.Linear: (_adapted(nnx.Linear), "kernel"), Matrix: (_adapted(Matrix), "matrix")}
_PLAIN = {adapted: (plain, weight) for plain, (adapted, weight) in _KINDS.items()}


def adapt(model: nnx.Module, lora: Lora, rngs) -> None:
    """Puts adapters, in place, at the linear layers whose path `lora.targets` matches; a UserError without one."""
    layers = {"/".join(map(str, path)): (path, m) for path, m in nnx.iter_modules(model) if type(m) in _KINDS}
    named = [name for name in layers if re.fullmatch(lora.targets, name)]
    if not named:
        raise UserError(f"lora.targets={lora.targets!r} matches no layer: layers are named like {listing(layers, 6)}")
    for index, name in enumerate(named):
        path, layer = layers[name]
        adapted, weight = _KINDS[type(layer)]
        letters = path[-1] if path[-1] in FUSED else ""
        parts = tuple(i for i, letter in enumerate(letters) if letter in lora.fused) if letters else (0,)
        if parts:
            layer.lora = Update(*getattr(layer, weight).shape, lora, max(len(letters), 1), parts, index, rngs)
            layer.__class__ = adapted


def merge(model: nnx.Module) -> nnx.Module:
    """A copy of an adapted model whose layers are plain again, with W + (alpha / rank) A B as weights, in float32.
    Everything that is not adapted is shared with `model`, bit for bit; so is a model without adapters."""
    if not any(type(m) in _PLAIN for _, m in nnx.iter_modules(model)):
        return model
    model = nnx.clone(model)
    for layer in [m for _, m in nnx.iter_modules(model) if type(m) in _PLAIN]:
        plain, weight = _PLAIN[type(layer)]
        setattr(layer, weight, nnx.Param(layer.lora.merged(getattr(layer, weight)[...])))
        del layer.lora
        layer.__class__ = plain
    return model
