"""CLIP's contrastive loss (arXiv 2103.00020, section 2.3): both towers on images with captions.

With x_i and y_j the embeddings of images and captions, of length one, and s the logarithm of the scale, logits are
l_ij = exp(s) x_i . y_j; loss = the mean of the cross-entropies of the rows and of the columns, in which the diagonal is
right. The negatives are the other images and captions of the micro-batch. The scale is trained too, at most 100.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from diva_jax.common.fields import field, parse
from diva_jax.data import inputs, preprocess
from diva_jax.models import backbones
from diva_jax.models.backbones.shared.transformer import Text
from diva_jax.objectives import contract
from diva_jax.objectives.shared import pairs
from diva_jax.weights import parts

Array = jax.Array

_LARGEST = float(np.log(100))  # Of the logarithm of the scale.


@dataclasses.dataclass(frozen=True)
class ClipOptions:
    """`config.clip`."""

    tokenizer: str = field("", "The tokenizer's files are in this folder; if empty, they are those of backbone.source.")


SECTION = ClipOptions


def recipe(config: ConfigDict) -> None:
    """Both towers and the scale, with AdamW as CLIP's authors trained ViTs (appendix F)."""
    config.trainable = (("(vision|text)/.*", 1.0), ("logit_scale", 1.0))
    config.optim.update(name="adamw", lr=5e-4, b2=0.98, eps=1e-6, weight_decay=0.2)


class Objective(contract.Objective):
    """`vision`, `text` and `logit_scale` are trained, evaluated and exported."""

    compares_images = True

    def __init__(self, config, *, rngs):
        self.spec, self.options = backbones.spec_of(config), parse(ClipOptions, config.clip, "config.clip")
        contract.check_both_towers(self.spec, "clip")
        kw = dict(rngs=rngs, dtype=jnp.dtype(config.dtype), remat=config.remat in ("vision", "all"))
        self.vision = backbones.build(self.spec, param_dtype=jnp.float32, **kw)
        self.text = Text(self.spec, **kw)
        self.logit_scale = nnx.Param(jnp.log(jnp.float32(1 / 0.07)))

    @property
    def inputs(self) -> Mapping[str, inputs.Input]:
        """{"image": uint8 [S, S, 3], "caption": int32 [context_length]}."""
        text, s = self.spec.text, self.spec
        tokenizer = parts.tokenizer(s.source, text, self.options.tokenizer, "config.clip.tokenizer")
        return {"image": inputs.Image(s.image_size), "caption": inputs.Tokens(text.context_length, tokenizer)}

    def pretrained(self) -> Mapping[str, parts.Part]:
        """See `contract.Objective`; every parameter has a source."""
        source = self.spec.source
        return {
            "vision": parts.vision(source, self.spec),
            "text": parts.text(source, self.spec),
            "logit_scale": parts.scalar(source, "logit_scale"),
        }

    def towers(self) -> Mapping[str, nnx.Module]:
        return {"vision": self.vision, "text": self.text, "logit_scale": self.logit_scale}

    def loss(self, batch: Mapping[str, Array], keys: Array) -> tuple[Array, dict[str, Array]]:
        """One micro-batch; the keys are not used.

        Args:
          batch: {"image": uint8 [B, S, S, 3], "caption": int32 [B, N]}.
          keys: one per image, [B].

        Returns:
          (loss, {"loss", "accuracy": the share of images whose own caption has the largest logit}).
        """

        view = preprocess.normalise(preprocess.to_float(batch["image"]), self.spec.mean, self.spec.std)
        with jax.named_scope("vision"):
            images = pairs.unit(self.vision.encode(view).pooled)
        with jax.named_scope("text"):
            texts = pairs.unit(self.text.encode(batch["caption"]))
        logits = jnp.exp(jnp.minimum(self.logit_scale[...], _LARGEST)) * images @ texts.T  # [B, B]
        right = jnp.mean(jnp.argmax(logits, axis=1) == jnp.arange(len(logits)))
        loss = pairs.contrast(logits)
        return loss, {"loss": loss, "accuracy": right}
