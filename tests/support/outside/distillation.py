"""Distillation: low-rank adapters and a linear head fit the embedding of a CLIP tower to that of a frozen teacher."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from diva_jax import objectives
from diva_jax.common import fields
from diva_jax.data import inputs, preprocess
from diva_jax.models import adapters, backbones
from diva_jax.weights import parts


def default() -> ConfigDict:
    c = ConfigDict()
    c.head_steps = 2  # Initial steps that train only the head.
    c.head_lr = 1e-2  # Their peak learning rate.
    c.lora = ConfigDict(dataclasses.asdict(adapters.Lora(rank=3, alpha=6.0, dropout=0.25, biases=True)))
    c.teacher = ConfigDict(dataclasses.asdict(backbones.Spec(arch="siglip", embed_dim=1024)))
    return c


def recipe(config: ConfigDict) -> None:
    config.trainable = (*adapters.Lora(**config.distillation.lora).trainable("vision"), ("head/.*", 1.0), (".*", 0.0))
    config.optim.update(name="adamw", lr=1e-2)


def stages(config: ConfigDict) -> tuple[objectives.Stage, ...]:
    c = config.distillation
    head = objectives.Stage("head", 0, c.head_steps, c.head_lr, (("head/.*", 1.0), (".*", 0.0)))
    return head, objectives.tune(config, c.head_steps)


class Objective(objectives.Objective):
    def __init__(self, config, *, rngs):
        self.spec = backbones.spec_of(config)
        self.taught_by = fields.parse(backbones.Spec, config.distillation.teacher, "config.distillation.teacher")
        kw = dict(rngs=rngs, dtype=jnp.dtype(config.dtype))
        self.vision = backbones.build(self.spec, **kw)
        adapters.adapt(self.vision, adapters.Lora(**config.distillation.lora), rngs)
        self.teacher = backbones.build(self.taught_by, param_dtype=jnp.dtype(config.frozen_dtype), **kw)
        self.head = nnx.Linear(self.spec.embed_dim, self.taught_by.embed_dim, **kw)

    @property
    def inputs(self):
        return {"image": inputs.Image(self.spec.image_size), "teacher": inputs.Image(self.taught_by.image_size)}

    def pretrained(self):
        source = self.taught_by.source
        return {
            "vision": parts.vision(self.spec.source, self.spec, fresh=(adapters.FRESH,)),
            "teacher": parts.vision(source, self.taught_by, "config.distillation.teacher"),
        }

    def towers(self):
        return {"vision": adapters.merge(self.vision)}

    def loss(self, batch, keys):
        def view(name, spec):
            return preprocess.normalise(preprocess.to_float(batch[name]), spec.mean, spec.std)

        with adapters.dropout(keys):
            student = self.head(self.vision.encode(view("image", self.spec)).pooled)
        wanted = jax.lax.stop_gradient(self.teacher.encode(view("teacher", self.taught_by)).pooled)
        loss = jnp.mean(jnp.square(student - wanted))
        return loss, {"loss": loss}
