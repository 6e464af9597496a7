"""SmartCLIP (arXiv 2507.22264): CLIP on long captions, each of which selects dimensions of the image embedding.

No code of the authors could be read: this follows the description of the paper, and what the description leaves open
is decided here. For a batch of B images with embeddings x_i and captions with embeddings y_j, both [D]:

  mask      p_j = sigmoid(MaskNet(stop_gradient(states of caption j's tokens))), m_j = [p_j > 1/2], with the gradient
            of p_j (straight-through), [D];
  logits    s_ij = scale * cos(m_j * x_i, y_j), [B, B]: the mask of the caption is applied to the image embedding
            alone, and the cosine is that of the masked image and the whole caption;
  CE same image, different masks      = -mean_i log softmax_j(s_ij)[i]: image i against every caption, each
                                        under that caption's own mask;
  CE different images, same mask      = -mean_j log softmax_i(s_ij)[j]: caption j and its one mask against
                                        every image;
  loss      = align_weight * (the sum of both) + sparsity_weight * mean_jd |m_jd|, where |m| = m with a gradient of
              1 for every dimension, selected or not.

In evaluation and export there is no mask: x_i and y_j are compared as CLIP's are.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from diva_jax.common.fields import field, parse
from diva_jax.data import inputs, preprocess
from diva_jax.models import backbones
from diva_jax.models.backbones.shared.transformer import Block, Text, run
from diva_jax.models.layers import Array, Layers, attention, heads, widened
from diva_jax.objectives import contract
from diva_jax.objectives.shared import pairs
from diva_jax.weights import parts

# Least squared norm of a masked embedding, so that a mask of zeros gives a cosine of 0 and a finite gradient.
_FLOOR = 1e-12


@dataclasses.dataclass(frozen=True)
class SmartClipOptions:
    """`config.smartclip`."""

    align_weight: float = field(10.0, "The sum of the two cross-entropies is weighted with this.")
    sparsity_weight: float = field(2.0, "The share of dimensions that the masks select is weighted with this.")
    logit_scale: float = field(100.0, "Cosines are multiplied by this constant, which is neither trained nor exported.")
    tokenizer: str = field("", "The tokenizer's files are in this folder; if empty, they are those of backbone.source.")


SECTION = SmartClipOptions


def recipe(config: ConfigDict) -> None:
    """The published recipe: three epochs of 1.2 million long captions (ShareGPT4V) at 1,024 per step, 248 tokens."""
    config.steps, config.batch_size = 3650, 1024
    if config.backbone.text.layers:
        config.backbone.text.update(context_length=248, kept_positions=20)
    # AdamW at 1e-6; the mask network at 1e-3.
    config.trainable = (("mask_net/.*", 1000.0), ("(vision|text)/.*", 1.0))
    config.optim.update(name="adamw", lr=1e-6, weight_decay=0.01, decay_all=True, no_decay="mask_net/.*", clip=0.0)
    config.optim.warmup = 0.0547  # 200 steps.


class MaskNet(nnx.Module):
    """Token states [B, N, W] -> mask logits [B, D]: one transformer block, attention pooling, a linear layer. The block
    is one of the text tower's kind without its causal mask, and with a norm before it. A learned query attends to its
    normalised output, with the heads of the tower. Positions after the end of the text take part."""

    def __init__(self, spec: backbones.Spec, *, rngs: nnx.Rngs, dtype=jnp.float32, remat: bool = False):
        make, text = Layers(rngs, dtype), spec.text
        width, eps = text.width, text.norm_eps
        self.dtype, self.remat, self.heads = dtype, remat, text.heads
        self.norm_in = make.layer_norm(width, eps)
        self.blocks = nnx.List([Block(make, width, text.heads, text.mlp_dim, text.activation or spec.activation, eps)])
        self.norm = make.layer_norm(width, eps)
        self.query = make.param(nnx.initializers.normal(width**-0.5), width)
        # A bias of the keys would add the same to every score of the query.
        self.keys, self.values = make.linear(width, width, bias=False), make.linear(width, width)
        self.proj = make.linear(width, spec.embed_dim)

    def __call__(self, states: Array) -> Array:
        x = self.norm(run(self.blocks, self.norm_in(states), remat=self.remat))
        query = jnp.broadcast_to(self.query[...].astype(self.dtype), (len(x), 1, x.shape[-1]))
        return self.proj(attention(*[heads(a, self.heads) for a in (query, self.keys(x), self.values(x))])[:, 0])


def binary(logits: Array) -> Array:
    """Logits -> 1.0 where their sigmoid is above 1/2, else 0.0, with the sigmoid's gradient."""
    soft = jax.nn.sigmoid(logits)
    return soft + jax.lax.stop_gradient((soft > 0.5).astype(soft.dtype) - soft)


def masked_cosines(images: Array, texts: Array, masks: Array) -> Array:
    """cos(masks[j] * images[i], texts[j]): [B, D], [C, D], [C, D] -> [B, C], without an array of [B, C, D]."""
    exact = jax.lax.Precision.HIGHEST
    texts = pairs.unit(texts)
    products = jnp.matmul(images, (masks * texts).T, precision=exact)
    squares = jnp.matmul(images * images, (masks * masks).T, precision=exact)
    return products * jax.lax.rsqrt(jnp.maximum(squares, _FLOOR))


class Objective(contract.Objective):
    """`vision`, `text` and `mask_net` are trained; evaluation and export see the first two."""

    compares_images = True

    def __init__(self, config, *, rngs):
        self.spec = backbones.spec_of(config)
        self.options = parse(SmartClipOptions, config.smartclip, "config.smartclip")
        contract.check_both_towers(self.spec, "smartclip")
        kw = dict(rngs=rngs, dtype=jnp.dtype(config.dtype), remat=config.remat in ("vision", "all"))
        self.vision = contract.vision_tower(config, self.spec, rngs)
        self.text = Text(self.spec, **kw)
        self.mask_net = MaskNet(self.spec, **kw)

    @property
    def inputs(self) -> Mapping[str, inputs.Input]:
        """{"image": uint8 [S, S, 3], "caption": int32 [context_length], of a random number of first sentences}."""
        text, s = self.spec.text, self.spec
        tokenizer = parts.tokenizer(s.source, text, self.options.tokenizer, "config.smartclip.tokenizer")
        return {
            "image": inputs.Prepared(s.image_size, s.resize_mode, s.interpolation),
            "caption": inputs.Tokens(text.context_length, tokenizer, inputs.first_sentences),
        }

    def pretrained(self) -> Mapping[str, parts.Part]:
        """See `contract.Objective`; `mask_net` has no source."""
        source = self.spec.source
        return {"vision": parts.vision(source, self.spec), "text": parts.text(source, self.spec)}

    def towers(self) -> Mapping[str, nnx.Module]:
        return {"vision": self.vision, "text": self.text}

    def forward(self, view: Array, ids: Array) -> tuple[Array, dict[str, Array]]:
        """The loss of normalised images [B, S, S, 3] and token ids, int32 [B, N], and everything on the way to it.
        Returns (loss, {images, texts, masks [B, D], logits [B, B], same_image, same_mask, selected []})."""
        images = self.encode(view).pooled
        with jax.named_scope("text"):
            states = self.text.states(ids)
            texts = self.text.embed(states, ids)
        with jax.named_scope("mask_net"):
            mask_logits = self.mask_net(jax.lax.stop_gradient(states))
        images, texts, masks = widened(images), widened(texts), binary(widened(mask_logits))
        logits = self.options.logit_scale * masked_cosines(images, texts, masks)
        same_image, same_mask = (-jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits, axis=a))) for a in (1, 0))
        selected = jnp.mean(masks)  # |m| = m; that of rounded zeros would have a gradient of either sign.
        value = self.options.align_weight * (same_image + same_mask) + self.options.sparsity_weight * selected
        seen = dict(images=images, texts=texts, masks=masks, logits=logits)
        return value, seen | dict(same_image=same_image, same_mask=same_mask, selected=selected)

    def loss(self, batch: Mapping[str, Array], keys: Array) -> tuple[Array, dict[str, Array]]:
        """See `contract.Objective`; other images and captions of the micro-batch are the negatives, keys are not used.
        The metrics are "loss", "loss_same_image", "loss_same_mask", "selected" (the share of dimensions selected)."""
        view = preprocess.normalise(preprocess.to_float(batch["image"]), self.spec.mean, self.spec.std)
        value, seen = self.forward(view, batch["caption"])
        metrics = {"loss": value, "selected": seen["selected"]}
        return value, metrics | {f"loss_{k}": seen[k] for k in ("same_image", "same_mask")}
