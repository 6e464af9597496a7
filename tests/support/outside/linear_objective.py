"""An objective that compiles in a moment: a linear map of the mean colour is to predict noise of its own."""

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from diva_jax import objectives
from diva_jax.data import inputs


def default() -> ConfigDict:
    return ConfigDict({"size": 12})


def recipe(config: ConfigDict) -> None:
    config.trainable = (("map/.*", 1.0), (".*", 0.0))


class Objective(objectives.Objective):
    def __init__(self, config, *, rngs):
        self.size = config.linear_objective.size
        self.map = nnx.Linear(3, 5, rngs=rngs)
        self.offset = nnx.Param(jnp.full((5,), 0.25))

    @property
    def inputs(self):
        return {"image": inputs.Image(self.size)}

    def loss(self, batch, keys):
        colour = batch["image"].astype(jnp.float32).mean((1, 2)) / 255
        noise = jax.vmap(lambda key: jax.random.normal(key, (5,)))(keys)
        loss = jnp.mean(jnp.square(self.map(colour) + self.offset.get_value() - noise))
        return loss, {"loss": loss, "noise": jnp.mean(noise)}
