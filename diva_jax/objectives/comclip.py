"""ComCLIP: the vision tower alone on images with captions, held to the untuned one and to DINOv2's similarities.

No code of the authors could be read; docs/OBJECTIVES.md says what is known. The loss is that of `training.terms`:
  contrast.weight * CLIP's contrastive loss at a fixed temperature, with the frozen text tower
  + anchor.weight * the mean squared distance of the unit embeddings to the untuned encoder's
  + relation.weight * the divergence of the similarities within the batch from those of a frozen DINOv2, config.teacher.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from diva_jax.common.errors import UserError
from diva_jax.data import inputs
from diva_jax.models import backbones
from diva_jax.objectives import contract
from diva_jax.weights import parts


def recipe(config: ConfigDict) -> None:
    """The published recipe: one epoch of CC3M at 1,024 per step; the weights of the terms are not known."""
    config.steps, config.batch_size = 2875, 1024
    config.contrast.weight, config.relation.weight = 1.0, 1.0
    config.anchor.update(weight=1.0, of="unit")
    config.optim.update(name="adamw", lr=1e-6, weight_decay=0.1, warmup_steps=410)


def validate(config: ConfigDict) -> None:
    """Raises a UserError where no term has a weight."""
    if not any(config[term].weight for term in ("contrast", "anchor", "relation")):
        problem = "config.objective=comclip trains nothing without a term"
        advice = "give config.contrast.weight, config.anchor.weight or config.relation.weight above 0"
        raise UserError(f"{problem}: {advice}")


class Objective(contract.Objective):
    """`vision` is trained; the terms have the frozen models."""

    terms_alone = True

    def __init__(self, config, *, rngs):
        self.spec = backbones.spec_of(config)
        self.vision = contract.vision_tower(config, self.spec, rngs)

    @property
    def inputs(self) -> Mapping[str, inputs.Input]:
        """{"image": uint8 [S, S, 3]}, a random crop; the contrast adds the caption."""
        return {"image": inputs.Image(self.spec.image_size)}

    def pretrained(self) -> Mapping[str, parts.Part]:
        return {"vision": parts.vision(self.spec.source, self.spec)}

    def loss(self, batch: Mapping[str, jax.Array], keys: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Zero: ComCLIP has no loss of its own, and the terms of the config are all that is trained."""
        value = jnp.float32(0)
        return value, {"loss": value}
