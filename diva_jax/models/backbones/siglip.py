"""SigLIP's Vision Transformer (arXiv 2303.15343), as timm and open_clip run it.

SigLIP 2's towers of fixed resolution (arXiv 2502.14786) are the same; their text towers have a vocabulary of 256,000
and tanh's approximation of GELU.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from diva_jax.common.errors import UserError
from diva_jax.models.backbones import HALF, Features, Spec
from diva_jax.models.backbones.shared import open_clip_config as occ, transformers_layout as hf
from diva_jax.models.backbones.shared.transformer import Mlp, blocks, embedded, run, run_dense
from diva_jax.models.layers import Layers, attention, heads

CHECKPOINT = occ.checkpoint("siglip")
shapes = CHECKPOINT.shapes
_SIGLIP2_VOCABULARY = 256000


class AttentionPool(nnx.Module):
    """Attention of one learned query over all patch tokens, then an MLP with a residual."""

    def __init__(self, make: Layers, spec: Spec):
        width = spec.width
        self.heads, self.dtype = spec.heads, make.dtype
        self.latent = make.param(nnx.initializers.truncated_normal(width**-0.5), 1, 1, width)
        self.q = make.linear(width, width)
        self.kv = make.linear(width, 2 * width)
        self.proj = make.linear(width, width)
        self.norm = make.layer_norm(width, spec.norm_eps)
        self.mlp = Mlp(make, width, spec.mlp_dim, spec.activation)

    def __call__(self, tokens: jax.Array) -> jax.Array:  # [B, P, D] -> [B, D]
        q = self.q(self.latent[...].astype(self.dtype))  # [1, 1, D]
        q = jnp.broadcast_to(q, (tokens.shape[0], *q.shape[1:]))
        k, v = jnp.split(self.kv(tokens), 2, axis=-1)
        x = self.proj(attention(heads(q, self.heads), heads(k, self.heads), heads(v, self.heads)))
        return (x + self.mlp(self.norm(x)))[:, 0]

    def each(self, tokens: jax.Array) -> jax.Array:
        """[B, P, D] -> [B, P, D]: what the pool makes of each token if its query attends to that token alone."""
        _, v = jnp.split(self.kv(tokens), 2, axis=-1)
        x = self.proj(v)
        return x + self.mlp(self.norm(x))


class Vision(nnx.Module):
    """The vision tower of `spec` with random weights; arguments as `backbones.build`'s."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32, remat: bool = False):
        make = Layers(rngs, dtype, param_dtype)
        width, eps = spec.width, spec.norm_eps
        if spec.embed_dim != width:
            raise UserError(f"a siglip backbone has no projection: set its embed_dim to its width, {width}")
        self.dtype, self.remat = dtype, remat
        self.patch_embed = make.conv(3, width, spec.patch_size, spec.patch_size)
        self.pos_embed = make.param(nnx.initializers.truncated_normal(width**-0.5), 1, spec.patches, width)
        self.blocks = blocks(make, spec.layers, width, spec.heads, spec.mlp_dim, spec.activation, eps)
        self.norm = make.layer_norm(width, eps)
        self.attn_pool = AttentionPool(make, spec)

    def encode(self, images: jax.Array) -> Features:
        """Normalised float images [B, H, W, 3] -> tokens [B, P, D] and pooled [B, D], in `dtype`. Where the side is no
        multiple of the patch (384 by 14), the rest at the right and the bottom is not used."""
        tokens = self.norm(run(self.blocks, embedded(self, images), remat=self.remat))  # [B, P, D]
        return Features(tokens=tokens, pooled=self.attn_pool(tokens))

    def encode_dense(self, images: jax.Array, last: str = "plain") -> jax.Array:
        """Images -> patch tokens [B, P, D] in the text's space, each pooled alone; `last` of `transformer.VARIANTS`."""
        return self.attn_pool.each(self.norm(run_dense(self.blocks, embedded(self, images), last)))


_TEXT_RULES = dict(causal=False, pool="last", proj_bias=True, tokenizer="siglip")
_TANH = hf.ACTIVATIONS["gelu_tanh"]


def _from_config(config: Mapping[str, Any], preprocessor: Mapping, where: str) -> tuple[Spec, frozenset[str]]:
    """See `hf.Layout`. transformers' published configs name tanh's approximation of GELU in both towers. open_clip, and
    this Spec, run them with the exact GELU, but for SigLIP 2's text towers and some vision towers of timm's. An export
    of this package, which `exported_by` marks, is run as it says."""
    (vision, activation), (text, text_activation) = hf.tower_options(config, hf.DEFAULTS["siglip"], where)
    fields = hf.vision_fields(vision)
    published = "exported_by" not in config and vision["hidden_act"] == text["hidden_act"] == _TANH
    if published:
        towers = (tower for tower in CHECKPOINT.timm.values() if all(tower[k] == v for k, v in fields.items()))
        activation = next((tower["activation"] for tower in towers), "gelu")
        text_activation = "gelu_tanh" if text["vocab_size"] == _SIGLIP2_VOCABULARY else "gelu"
    spec = Spec(
        arch="siglip",
        **fields | hf.preprocessing(preprocessor, fields["image_size"], HALF, HALF, where, crops=False),
        embed_dim=vision["hidden_size"],
        activation=activation,
        text=hf.text_spec(text, activation, text_activation, **_TEXT_RULES),
    )
    return spec, frozenset({"activation"} if published else ())


def _to_config(spec: Spec, dtype: str) -> dict:
    known = all(getattr(spec.text, field) == value for field, value in _TEXT_RULES.items() if field != "tokenizer")
    hf.require_text(spec, known)
    text = dict(projection_size=spec.embed_dim)
    return hf.two_towers(spec, dtype, "siglip", "SiglipModel", {}, text, exported_by="diva_jax")


TRANSFORMERS = hf.Layout({"siglip": "SiglipModel"}, "vision_model.", _from_config, _to_config, "Siglip")
