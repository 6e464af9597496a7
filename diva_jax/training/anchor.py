"""The anchor: any objective, with a term that keeps the tuned encoder's embeddings near those of the untuned one."""

import functools

import jax.numpy as jnp

from diva_jax.common.errors import UserError
from diva_jax.costs import flops
from diva_jax.data import preprocess
from diva_jax.models import backbones
from diva_jax.objectives import Objective
from diva_jax.weights import parts

PREFIX = "anchor"  # Of the names of the untuned encoder's parameters, which no stage trains.


@functools.cache
def anchored(kind: type[Objective]) -> type[Objective]:
    """`kind`, an objective with an input "image", with `config.anchor.weight` times the anchor term added to its loss.

    The term is the squared distance of the pooled embedding to that of a frozen copy of `config.backbone.source`: the
    sum over dimensions, the mean over images. Both encoders see the image, uint8 [S, S, 3], resized to the backbone's
    resolution as its own preprocessing does. It costs a forward pass of each and a backward pass of the tuned one.
    """

    class Anchored(kind):
        def __init__(self, config, *, rngs):
            super().__init__(config, rngs=rngs)
            if "image" not in self.inputs:
                raise UserError(
                    f"config.anchor.weight={config.anchor.weight} needs an objective with an input named image, and "
                    f"{config.objective} has {', '.join(self.inputs)}: set it to 0"
                )
            self.anchor_spec, self.anchor_weight = backbones.spec_of(config), config.anchor.weight
            dtype, frozen = jnp.dtype(config.dtype), jnp.dtype(config.frozen_dtype)
            self.anchor = backbones.build(self.anchor_spec, rngs=rngs, dtype=dtype, param_dtype=frozen)

        def pretrained(self):
            return {**super().pretrained(), PREFIX: parts.vision(self.anchor_spec.source, self.anchor_spec)}

        def flops(self):
            counted = super().flops()
            return None if counted is None else counted + 4 * flops.vision(self.anchor_spec)

        def loss(self, batch, keys):
            """As the objective's own; the metric "anchor" is the term without its weight."""
            value, metrics = super().loss(batch, keys)
            spec = self.anchor_spec
            view = preprocess.backbone_view(
                preprocess.to_float(batch["image"]), spec.image_size, spec.mean, spec.std, "exact"
            )
            tuned, untuned = (tower.encode(view).pooled for tower in (self.towers()["vision"], self.anchor))
            wider = jnp.promote_types(tuned.dtype, jnp.float32)
            far = jnp.mean(jnp.sum(jnp.square(tuned.astype(wider) - untuned.astype(wider)), axis=-1))
            return value + self.anchor_weight * far, {**metrics, "anchor": far}

    return Anchored
