"""Contrastive tuning of both towers on images with captions; negatives are the other captions of the micro-batch."""

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from diva_jax import objectives
from diva_jax.data import inputs, preprocess
from diva_jax.models import backbones
from diva_jax.models.backbones.shared.text import Text
from diva_jax.weights import parts


def default() -> ConfigDict:
    c = ConfigDict()
    c.tokenizer = ""  # Folder with the tokenizer's files; empty: that of backbone.source.
    return c


def recipe(config: ConfigDict) -> None:
    config.trainable = (("vision/.*", 1.0), ("text/.*", 1.0), ("logit_scale", 1.0))


class Objective(objectives.Objective):
    compares_images = True

    def __init__(self, config, *, rngs):
        self.spec, self.tokenizer = backbones.spec_of(config), config.captions.tokenizer
        kw = dict(rngs=rngs, dtype=jnp.dtype(config.dtype))
        self.vision, self.text = backbones.build(self.spec, **kw), Text(self.spec, **kw)
        self.logit_scale = nnx.Param(jnp.zeros((), jnp.float32))

    @property
    def inputs(self):
        tokenizer = parts.tokenizer(self.spec.source, self.spec.text, self.tokenizer)
        return {
            "image": inputs.Image(self.spec.image_size),
            "caption": inputs.Tokens(self.spec.text.context_length, tokenizer),
        }

    def pretrained(self):
        source = self.spec.source
        return {
            "vision": parts.vision(source, self.spec),
            "text": parts.text(source, self.spec),
            "logit_scale": parts.scalar(source, "logit_scale"),
        }

    def towers(self):
        return {"vision": self.vision, "text": self.text, "logit_scale": self.logit_scale}

    def loss(self, batch, keys):
        def unit(x):
            x = x.astype(jnp.float32)
            return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

        view = preprocess.normalise(preprocess.to_float(batch["image"]), self.spec.mean, self.spec.std)
        images, texts = unit(self.vision.encode(view).pooled), unit(self.text.encode(batch["caption"]))
        logits = jnp.exp(self.logit_scale[...]) * images @ texts.T  # [B, B]
        right = jnp.arange(len(logits))
        loss = 0.5 * sum(
            -jnp.mean(jax.nn.log_softmax(x, axis=-1)[right, right]) for x in (logits, logits.T)
        )  # fmt: skip
        return loss, {"loss": loss}
