"""Latent diffusion (arXiv 2112.10752) on images with captions: the U-Net and its text encoder, trained together.

For an image with latents z0 and a caption with token states c: a timestep t, noise eps, z_t = sqrt(abar_t) z0 +
sqrt(1 - abar_t) eps; loss = mean((UNet(z_t, t, c) - target)^2), target eps or, for a v-prediction model, v. The model
of the latents is frozen. It makes a generator for the other objectives; there is no vision encoder in it.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from diva_jax.data import inputs, preprocess, tokenizers
from diva_jax.models.diffusion import schedule
from diva_jax.models.diffusion.presets import Diffusion
from diva_jax.models.diffusion.text_encoder import TextEncoder
from diva_jax.models.diffusion.unet import UNet
from diva_jax.objectives import contract
from diva_jax.weights import origins, parts

Array = jax.Array

SECTIONS = ("diffusion",)


def recipe(config: ConfigDict) -> None:
    """AdamW, at a rate for small models."""
    config.trainable = (("(unet|text_encoder)/.*", 1.0), (".*", 0.0))
    config.optim.update(name="adamw", lr=1e-3, weight_decay=0.01)


class Objective(contract.Objective):
    """`unet` and `text_encoder` are trained."""

    def __init__(self, config, *, rngs):
        self.diffusion = Diffusion.from_dict(config.diffusion.to_dict())
        self.image_size = config.data.image_size
        kw = dict(rngs=rngs, dtype=jnp.dtype(config.dtype), param_dtype=jnp.float32)
        self.unet = UNet(self.diffusion.unet, remat=config.remat == "all", **kw)
        self.text_encoder = TextEncoder(self.diffusion.text_encoder, **kw)
        self.vae = self.diffusion.vae.build(**kw)

    @property
    def inputs(self) -> Mapping[str, inputs.Input]:
        """{"image": uint8 [S, S, 3] at the resolution of the latents' model, "caption": int32 [text_tokens]}."""
        d = self.diffusion

        def tokenizer():
            folder = origins.diffusers_folder(d.source) / "tokenizer"
            return tokenizers.ClipTokenizer(*tokenizers.clip_vocabulary(folder), d.text_tokens)

        return {"image": inputs.Image(self.image_size), "caption": inputs.Tokens(d.text_tokens, tokenizer)}

    def pretrained(self) -> Mapping[str, parts.Part]:
        """See `contract.Objective`; every parameter has a source."""
        d = self.diffusion
        return {
            name: parts.diffusers(d.source, getattr(d, name), f"config.diffusion.{name}")
            for name in ("unet", "text_encoder", "vae")
        }

    def towers(self) -> Mapping[str, nnx.Module]:
        """No towers: the models that are trained here are not encoders of images."""
        return {}

    def draw(self, keys: Array, latents_shape: tuple[int, ...]) -> tuple[Array, Array]:
        """(timesteps [B], int32, uniform over the schedule, and noise [B, h, w, c]) from one key per image, [B]."""

        def one(key):
            t, eps = jax.random.split(key)
            steps = self.diffusion.scheduler.num_train_timesteps
            return jax.random.randint(t, (), 0, steps), jax.random.normal(eps, latents_shape, jnp.float32)

        return jax.vmap(one)(keys)

    def latents(self, images: Array) -> Array:
        """uint8 [B, S, S, 3] -> z0, [B, h, w, c]."""
        return self.vae.encode(preprocess.vae_view(preprocess.to_float(images)))

    def errors(self, latents: Array, ids: Array, timesteps: Array, noise: Array) -> Array:
        """The loss of each image, [B], under captions with token ids int32 [B, N]."""
        c = self.diffusion.scheduler
        abar = schedule.alphas_cumprod(c)
        noisy = schedule.add_noise(latents, noise, abar, timesteps)
        with jax.named_scope("unet"):
            pred = self.unet(noisy, timesteps, self.text_encoder(ids))
        goal = schedule.target(latents, noise, abar, timesteps, c.prediction_type)
        return jnp.mean(jnp.square(pred.astype(goal.dtype) - goal), axis=(1, 2, 3))

    def loss(self, batch: Mapping[str, Array], keys: Array) -> tuple[Array, dict[str, Array]]:
        """One micro-batch.

        Args:
          batch: {"image": uint8 [B, S, S, 3], "caption": int32 [B, N]}.
          keys: PRNG keys, one per image, [B].

        Returns:
          (loss, {"loss": the same}).
        """
        latents = self.latents(batch["image"])
        errors = self.errors(latents, batch["caption"], *self.draw(keys, latents.shape[1:]))
        loss = jnp.mean(errors)
        return loss, {"loss": loss}
