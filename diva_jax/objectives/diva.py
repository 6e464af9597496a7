"""DIVA (arXiv 2407.20171): the diffusion loss of a frozen U-Net, conditioned on CLIP's own tokens.

For an image x: latents z0 = VAE(x); for each of N draws a timestep t and noise eps, z_t = sqrt(abar_t) z0 +
sqrt(1 - abar_t) eps; condition c = text + visual_proj(tokens of vision(x)); loss = mean((UNet(z_t, t, c) -
target)^2) (section 3.1, equations 1 to 4), target eps or, for a v-prediction model, v. The gradient runs
through the U-Net into `visual_proj` and `vision`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import FrozenConfigDict

from diva_jax.common.errors import UserError
from diva_jax.costs.flops import per_image as flops_per_image
from diva_jax.data import preprocess
from diva_jax.models import backbones
from diva_jax.models.backbones import spec_of
from diva_jax.models.diffusion import schedule
from diva_jax.models.diffusion.unet import UNet, UNetConfig
from diva_jax.models.diffusion.vae import VAE, VAEConfig
from diva_jax.objectives import condition, draws

__all__ = ["PRETRAINED", "Diva", "Draws", "build", "flops_per_image"]

Array = jax.Array

PRETRAINED = {"vision": "vision", "unet": "unet", "vae": "vae", "text_context": "text_context"}

# (switch, the values it may take); see `config.default` for what each one does.
SWITCHES = {
    "vae_view": ("exact", "faithful"),
    "backbone_stats": ("exact", "faithful"),
    "backbone_resize": ("exact", "faithful"),
    "draw_weights": ("exact", "faithful"),
    "backbone_passes": ("exact", "faithful"),
}


class Draws(NamedTuple):
    """The random numbers of one draw for B images (stacked: a leading axis N).

    Attributes:
      timesteps: [B], int32, in 0..T-1.
      noise: latents' shape [B, h, w, c], standard normal.
      token_indices: [B, K] patch indices, or None where no token is drawn.
    """

    timesteps: Array
    noise: Array
    token_indices: Array | None


class Diva(nnx.Module):
    """The objective; `vision` and `visual_proj` are what is usually trained."""

    def __init__(self, config, *, rngs: nnx.Rngs):
        self.spec = spec_of(config)
        self.config = FrozenConfigDict(config.diva)
        self.accum = config.accum
        for switch, values in SWITCHES.items():
            if self.config[switch] not in values:
                raise UserError(f"config.diva.{switch}={self.config[switch]!r}: use {' or '.join(values)}")
        d = config.diffusion
        unet_config = UNetConfig.from_dict(d.unet.to_dict())
        if unet_config.class_embed_dim is not None:
            raise UserError(
                "the diva objective has no class embedding to give to this U-Net "
                "(class_embed_type is set): use stable-diffusion-2-1-base, 2-1 or v1-5 as config.diffusion"
            )
        self.schedule = schedule.ScheduleConfig.from_dict(d.scheduler.to_dict())
        dtype, frozen = jnp.dtype(config.dtype), jnp.dtype(config.frozen_dtype)
        kw = dict(rngs=rngs, dtype=dtype)
        again = config.remat in ("vision", "all")
        self.vision = backbones.build(self.spec, param_dtype=jnp.float32, remat=again, **kw)
        width, cross = self.spec.embed_dim, unet_config.cross_attention_dim
        # As PyTorch's nn.Linear, which the authors use: uniform in +-1/sqrt(fan in), the bias too.
        uniform = nnx.initializers.uniform(2 * width**-0.5)
        self.visual_proj = nnx.Linear(
            width,
            cross,
            dtype=dtype,
            rngs=rngs,
            kernel_init=lambda *a: uniform(*a) - width**-0.5,
            bias_init=lambda *a: uniform(*a) - width**-0.5,
        )
        self.unet = UNet(unet_config, param_dtype=frozen, remat=config.remat == "all", **kw)
        self.vae = VAE(VAEConfig.from_dict(d.vae.to_dict()), param_dtype=frozen, **kw)
        self.text_context = nnx.Variable(jnp.zeros((1, d.text_tokens, cross), jnp.float32))
        condition.check(self.spec.select, self.spec.add_text, self.spec.patches, d.text_tokens)

    def draw(self, keys: Array, latents_shape: tuple[int, int, int], count: int | None = None) -> Draws:
        """N draws (`count`, or config.diva.draws) from one key an image, [B]; each depends on its image's key alone."""

        def one(key):
            t, eps, tokens = jax.random.split(key, 3)
            steps = self.schedule.num_train_timesteps
            return (
                jax.random.randint(t, (), 0, steps),
                jax.random.normal(eps, latents_shape, jnp.float32),
                tokens,
            )

        n = count or self.config.draws
        per_draw = jax.vmap(lambda key: jax.random.split(key, n), out_axes=1)(keys)  # [N, B]
        timesteps, noise, token_keys = jax.vmap(jax.vmap(one))(per_draw)
        indices = jax.vmap(lambda k: condition.draw_token_indices(k, self.spec.select, self.spec.patches))(token_keys)
        return Draws(timesteps, noise, indices)

    def views(self, pixels: Array) -> tuple[Array, Array]:
        """Pixels [B, S, S, 3] in [0, 1] -> (VAE view, backbone view), each normalised for its model."""
        c, faithful = self.config, "faithful"
        stats = (
            (backbones.OPENAI_MEAN, backbones.OPENAI_STD)
            if c.backbone_stats == faithful
            else (self.spec.mean, self.spec.std)
        )
        return (
            preprocess.vae_view(pixels, c.vae_view),
            preprocess.backbone_view(pixels, self.spec.image_size, *stats, c.backbone_resize),
        )

    def weights(self) -> Array:
        """The weight of each draw's loss in the gradient, [N].

        The step averages over the micro-batches, so `faithful`, where the last draw alone is divided by the
        number of micro-batches A and everything is summed, reads (A, ..., A, 1).
        """
        n = self.config.draws
        if self.config.draw_weights == "exact":
            return jnp.full((n,), 1 / n, jnp.float32)
        return jnp.asarray([self.accum] * (n - 1) + [1], jnp.float32)

    def context(self, visual_proj: nnx.Module, seen: backbones.Features, draw: Draws) -> tuple[Array, Array]:
        """What the encoder sees -> (its tokens that condition the U-Net [B, n, D], the condition [B, n, C])."""
        f = condition.select_tokens(seen, self.spec.select, draw.token_indices)
        return f, condition.add_text(visual_proj(f), self.text_context[...], self.spec.add_text)

    def denoise(self, latents: Array, draw: Draws, context: Array) -> tuple[Array, Array]:
        """(what the U-Net predicts from a draw's noisy latents, what it should), [B, h, w, c], float32 or wider."""
        abar = schedule.alphas_cumprod(self.schedule)
        noisy = schedule.add_noise(latents, draw.noise, abar, draw.timesteps)
        with jax.named_scope("unet"):
            pred = self.unet(noisy, draw.timesteps, context)
        goal = schedule.target(latents, draw.noise, abar, draw.timesteps, self.schedule.prediction_type)
        return pred.astype(jnp.promote_types(pred.dtype, jnp.float32)), goal

    def forward(self, pixels: Array, drawn: Draws) -> tuple[Array, dict]:
        """The loss and everything on the way to it.

        Args:
          pixels: [B, S, S, 3] in [0, 1].
          drawn: N draws, stacked.

        Returns:
          (weighted sum of the draws' losses, {latents [B, h, w, c]; and by draw: features [N, B, n, D],
          context [N, B, n, C], pred_noise [N, B, h, w, c], losses [N]}).
        """
        vae_view, backbone_view = self.views(pixels)
        with jax.named_scope("vae"):
            latents = self.vae.encode(vae_view)
        shared = self.config.backbone_passes == "exact"
        towers = (self.visual_proj,) if shared else (self.visual_proj, self.vision)
        graph, params = nnx.split(towers)

        def encode(vision):
            with jax.named_scope("vision"):
                return vision.encode(backbone_view)

        features = encode(self.vision) if shared else None

        def one_draw(inputs, draw: Draws):
            params, seen = inputs
            visual_proj, *vision = nnx.merge(graph, params)
            seen = encode(vision[0]) if vision else seen
            f, c = self.context(visual_proj, seen, draw)
            pred, goal = self.denoise(latents, draw, c)
            loss = jnp.mean(jnp.square(pred - goal))
            return loss, {"features": f, "context": c, "pred_noise": pred, "losses": loss}

        value, seen = draws.weighted_sum(one_draw, (params, features), drawn, self.weights())
        return value, {"latents": latents, **seen}

    def loss(self, batch: dict, keys: Array) -> tuple[Array, dict]:
        """One micro-batch.

        Args:
          batch: {"image": uint8 [B, S, S, 3]}.
          keys: PRNG keys, one an image, [B].

        Returns:
          (what is differentiated, {"loss": the plain mean over images and draws}).
        """
        pixels = preprocess.to_float(batch["image"])
        h, w = (s // self.vae.config.downscale for s in pixels.shape[1:3])
        value, seen = self.forward(pixels, self.draw(keys, (h, w, self.vae.config.latent_channels)))
        return value, {"loss": jnp.mean(seen["losses"])}

    def condition_losses(self, batch: dict, keys: Array, edges: np.ndarray) -> dict[str, Array]:
        """The loss of each image under its own condition, under another image's, and under the text alone.

        One draw an image and bin; timesteps, noise and token draw are the same under all three conditions. For the
        text alone the visual part is zero: the condition is the prompt's states as they are (`add_text` token), or
        their mean in every one of its tokens (mean).

        Args:
          batch: {"image", "other": uint8 [B, S, S, 3]}, `other` being whose condition is borrowed.
          keys: PRNG keys, one an image, [B].
          edges: [K + 1] ints; the timestep of draw k is uniform in edges[k] .. edges[k + 1] - 1.

        Returns:
          {"own", "other", "text": [K, B]}.
        """
        views = [self.views(preprocess.to_float(batch[k])) for k in ("image", "other")]
        latents = self.vae.encode(views[0][0])
        both = jax.lax.map(self.vision.encode, jnp.stack([view for _, view in views]))
        seen = [backbones.Features(*(x[i] for x in both)) for i in (0, 1)]  # By itself, by the other.
        drawn = self.draw(keys, latents.shape[1:], len(edges) - 1)
        within = drawn.timesteps * np.diff(edges)[:, None] // self.schedule.num_train_timesteps
        drawn = drawn._replace(timesteps=(edges[:-1, None] + within).astype(jnp.int32))

        def loss(draw: Draws, context: Array) -> Array:
            pred, goal = self.denoise(latents, draw, context)
            return jnp.mean(jnp.square(pred - goal), axis=(1, 2, 3))

        def one_draw(draw: Draws) -> Array:
            own, other = (self.context(self.visual_proj, f, draw)[1] for f in seen)
            text = condition.add_text(jnp.zeros_like(own), self.text_context[...], self.spec.add_text)
            return jax.lax.map(lambda context: loss(draw, context), jnp.stack([own, other, text]))  # [3, B]

        losses = jax.lax.map(one_draw, drawn)
        return {name: losses[:, i] for i, name in enumerate(("own", "other", "text"))}


def build(config, rngs: nnx.Rngs) -> Diva:
    """The objective of a config with random weights (under `nnx.eval_shape`: its shapes alone)."""
    return Diva(config, rngs=rngs)
