"""un²CLIP (arXiv 2505.24517): the vision tower learns to invert unCLIP's decoder of its embedding (arXiv 2204.06125).

For an image x: latents z0 = VAE(x), a timestep t and noise eps, z_t = sqrt(abar_t) z0 + sqrt(1 - abar_t) eps; the
embedding e = vision(x), pooled and projected, not normalised; the class label c = [e', code(level)], where e' is e with
noise as in Stability's code of Stable unCLIP (`embed_noise`); G = UNet(z_t, t, text, c), a v-prediction under the
states of an empty prompt. loss = mean((G - v)^2) with v = sqrt(abar_t) eps - sqrt(1 - abar_t) z0 (arXiv 2202.00512,
section 4). The gradient runs through the U-Net into `vision`, all else is frozen.

Which of the options below the method's authors used is not known: see docs/OBJECTIVES.md.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from diva_jax.common.errors import UserError
from diva_jax.common.fields import Rule, below, choice, field, parse
from diva_jax.data import preprocess
from diva_jax.models.diffusion import schedule
from diva_jax.models.diffusion.unet import timestep_embedding
from diva_jax.models.layers import Array, widened
from diva_jax.objectives import contract
from diva_jax.objectives.shared.stable_diffusion import StableDiffusionObjective
from diva_jax.weights import parts

SECTIONS = ("diffusion",)
# The schedule of the noise that is added to embeddings.
LEVELS = schedule.ScheduleConfig(beta_schedule="squaredcos_cap_v2")
_EMBED_NOISE = re.compile(r"none|mean0|random|level\d{1,3}")


@dataclasses.dataclass(frozen=True)
class UnclipOptions:
    """`config.unclip`."""

    target: str = choice(
        ("v", "eps"),
        "The target is the generator's own objective (v), or its noise (eps), which weighs timestep t by abar_t.",
    )
    embed_noise: str = field(
        "none",
        "The noise of embeddings is none, that of level 0 without its noise (mean0), of level L (level<L>), or of any "
        "level (random).",
        Rule(_EMBED_NOISE.fullmatch, "must be none, mean0, random or level<L>, e.g. level0, L below 1000"),
    )
    embed_drop: float = field(0.0, "The class label is zero for this share of the images.", below(0, 1))
    stats: str = choice(("on", "off"), "Noise is scaled by the generator's mean and std (on), or by 0 and 1 (off).")
    latents: str = choice(("sample", "mean"), "Latents are a sample of the VAE's posterior or its mean.")
    condition_of: str = choice(
        ("own", "next"),
        "The condition is the image's own, or that of the next image in the batch, a control that can teach nothing.",
    )
    clip_view: str = choice(
        ("processor", "ldm"),
        "The tower's input is prepared by the backbone's own preprocessing (processor), or as in the generator's "
        "training (ldm).",
    )

    @property
    def level(self) -> int | None:
        """The noise level of every embedding; None where it is random."""
        if self.embed_noise == "random":
            return None
        return int(self.embed_noise.removeprefix("level")) if self.embed_noise.startswith("level") else 0

    @property
    def uses_statistics(self) -> bool:
        """Whether the result depends on the generator's statistics of embeddings."""
        return self.stats == "on" and self.embed_noise != "none"


SECTION = UnclipOptions


def recipe(config: ConfigDict) -> None:
    """What is known of the published recipe: AdamW, 3e-7, 32 images per step, about one epoch of CC3M."""
    config.steps, config.batch_size = 92_000, 32
    config.optim.update(name="adamw", lr=3e-7)
    config.data.image_size = 768
    config.diffusion.prompt = ""
    config.diffusion.source = "sd2-community/stable-diffusion-2-1-unclip-small"


class UnclipDraws(NamedTuple):
    """The random numbers of B images: timesteps [B], int32, in 0..T-1; standard normal numbers of the latents' shape
    [B, h, w, c] for the diffusion and for a sample of the VAE's posterior, and for the embeddings, [B, d]; uniform
    noise levels of the embeddings, int32 [B]; whether the image keeps its class label, bool [B]."""

    timesteps: Array
    noise: Array
    posterior: Array
    embed_noise: Array
    levels: Array
    keep: Array


class EmbeddingStatistics(nnx.Module):
    """Mean and standard deviation of image embeddings, [1, d] each; 0 and 1 until they are loaded."""

    def __init__(self, d: int):
        self.mean, self.std = nnx.Variable(jnp.zeros((1, d))), nnx.Variable(jnp.ones((1, d)))


class Objective(StableDiffusionObjective):
    """`vision` is what is usually trained."""

    takes_class = True

    def __init__(self, config, *, rngs):
        self.options = parse(UnclipOptions, config.unclip, "config.unclip")
        self.compares_images = self.options.condition_of == "next"
        super().__init__(config, config.data.image_size)
        width, kind = self.diffusion.unet.class_embed_dim, self.diffusion.scheduler.prediction_type
        if width is None:
            problem = "config.objective=unclip needs a U-Net that is conditioned on an image embedding"
            raise UserError(f"{problem}: make the config with diffusion='unclip_l' or 'unclip_h'")
        if width != 2 * self.spec.embed_dim:
            problem = f"embeddings must have width {width // 2}, but those of the tower have {self.spec.embed_dim}"
            raise UserError(f"{problem}: use unclip_l with OpenAI's ViT-L/14 and unclip_h with OpenCLIP's ViT-H/14")
        if kind != "v_prediction":
            problem = f"config.objective=unclip expects a generator of v-predictions, not of prediction_type={kind!r}"
            raise UserError(f"{problem}: set it to v_prediction if the generator's own scheduler does")
        self.vision = contract.vision_tower(config, self.spec, rngs)
        self.build_generator(config, rngs)
        if self.options.uses_statistics:
            self.image_normalizer = EmbeddingStatistics(self.spec.embed_dim)

    def pretrained(self) -> Mapping[str, parts.Part]:
        """See `contract.Objective`; every parameter has a source, the statistics only where they are used."""
        used = self.options.uses_statistics
        statistics = {"image_normalizer": parts.embedding_statistics(self.diffusion.source)} if used else {}
        return {**super().pretrained(), **statistics}

    def draw(self, keys: Array, latents_shape: tuple[int, int, int]) -> UnclipDraws:
        """The random numbers of B images from one key each, [B]."""

        def one(key):
            t, eps, posterior, embed, level, keep = jax.random.split(key, 6)
            return UnclipDraws(
                timesteps=jax.random.randint(t, (), 0, self.timesteps),
                noise=jax.random.normal(eps, latents_shape, jnp.float32),
                posterior=jax.random.normal(posterior, latents_shape, jnp.float32),
                embed_noise=jax.random.normal(embed, (self.spec.embed_dim,), jnp.float32),
                levels=jax.random.randint(level, (), 0, LEVELS.num_train_timesteps),
                keep=jax.random.uniform(keep) >= self.options.embed_drop,
            )

        return jax.vmap(one)(keys)

    def view(self, pixels: Array) -> Array:
        """Pixels [B, S, S, 3] in [0, 1] -> the backbone's input, normalised."""
        s, mode = self.spec, "aligned" if self.options.clip_view == "ldm" else "exact"
        return preprocess.backbone_view(pixels, s.image_size, s.mean, s.std, mode)

    def encode_latents(self, pixels: Array, drawn: UnclipDraws, moments: Array | None = None) -> Array:
        """z0, [B, h, w, c]; see `latents`."""
        return self.latents(pixels, moments, None if self.options.latents == "mean" else drawn.posterior)

    def embed(self, view: Array) -> Array:
        """Backbone view -> the image embedding e, [B, d], float32 or wider."""
        return widened(self.encode(view).pooled)

    def class_labels(self, embed: Array, drawn: UnclipDraws) -> Array:
        """c = [e', code(level)], [B, 2 d], of embeddings e, [B, d]. With mean m and standard deviation s of embeddings,
        and noise n, e' = sqrt(abar_L) (e - m) / s + sqrt(1 - abar_L) n, times s, plus m; abar is that of `LEVELS`.
        code(L): cosines, then sines."""
        o = self.options
        levels = drawn.levels if o.level is None else jnp.full_like(drawn.levels, o.level)
        code = timestep_embedding(levels, embed.shape[-1]).astype(embed.dtype)
        if o.embed_noise != "none":
            mean, std = jnp.zeros_like(embed), jnp.ones_like(embed)
            if o.uses_statistics:
                mean, std = self.image_normalizer.mean[...], self.image_normalizer.std[...]
            noise = jnp.zeros_like(embed) if o.embed_noise == "mean0" else drawn.embed_noise
            abar = schedule.alphas_cumprod(LEVELS)
            embed = schedule.add_noise((embed - mean) / std, noise, abar, levels) * std + mean
        return jnp.concatenate([embed, code], axis=-1) * drawn.keep[:, None].astype(embed.dtype)

    def denoise(self, latents: Array, drawn: UnclipDraws, labels: Array) -> Array:
        """G, what the U-Net predicts from z_t under class labels [B, 2 d]: [B, h, w, c], float32 or wider."""
        noisy = self.noisy(latents, drawn.noise, drawn.timesteps)
        context = jnp.broadcast_to(self.text_context[...], (len(labels), *self.text_context.shape[1:]))
        return widened(self.run_unet(noisy, drawn.timesteps, context, labels))

    def errors(self, pred: Array, latents: Array, drawn: UnclipDraws) -> Array:
        """The loss of each image, [B]: the mean squared error of G, or of the noise that G implies."""
        if self.options.target == "v":
            wrong = pred - self.target(latents, drawn.noise, drawn.timesteps, "v_prediction")
        else:
            # eps = sqrt(abar) v + sqrt(1 - abar) z_t
            noisy = self.noisy(latents, drawn.noise, drawn.timesteps)
            wrong = self.noisy(pred, noisy, drawn.timesteps) - drawn.noise
        return jnp.mean(jnp.square(wrong), axis=(1, 2, 3))

    def forward(self, pixels: Array, drawn: UnclipDraws, moments: Array | None = None) -> tuple[Array, dict]:
        """The loss of pixels [B, S, S, 3] in [0, 1], and everything on the way to it. `moments` of the VAE's posterior,
        [B, h, w, 2 c], are computed where they are not given. Returns (scalar, {latents, pred [B, h, w, c], embed [B,
        d], class_labels [B, 2 d], errors [B]})."""
        view, latents = self.view(pixels), self.encode_latents(pixels, drawn, moments)
        embed = self.embed(view)
        if self.options.condition_of == "next":
            embed = jnp.roll(embed, -1, axis=0)
        labels = self.class_labels(embed, drawn)
        pred = self.denoise(latents, drawn, labels)
        errors = self.errors(pred, latents, drawn)
        return jnp.mean(errors), dict(latents=latents, embed=embed, class_labels=labels, pred=pred, errors=errors)

    def condition_losses(self, batch: dict, keys: Array, edges: np.ndarray) -> dict[str, Array]:
        """As `diva.Objective.condition_losses`, under the image's own embedding, another image's, and the text alone.
        For the text alone the class label is zero, as for the images that lost theirs in the generator's training. The
        latents are the same in all bins; no class label is dropped."""
        pixels = [preprocess.to_float(batch[k]) for k in ("image", "other")]
        embeds = jax.lax.map(self.embed, jnp.stack([self.view(p) for p in pixels]))
        latents = self.encode_latents(*self.draw_for(batch, keys))

        def one_bin(x):
            number, low, high = x
            _, drawn = self.draw_for(batch, jax.vmap(jax.random.fold_in, (0, None))(keys, number))
            within = drawn.timesteps * (high - low) // self.timesteps
            drawn = drawn._replace(timesteps=low + within, keep=jnp.ones_like(drawn.keep))
            own, other = (self.class_labels(e, drawn) for e in embeds)
            labels = jnp.stack([own, other, jnp.zeros_like(own)])
            errors = jax.lax.map(lambda c: self.errors(self.denoise(latents, drawn, c), latents, drawn), labels)
            return errors, drawn.timesteps

        edges = jnp.asarray(edges, jnp.int32)
        losses, timesteps = jax.lax.map(one_bin, (jnp.arange(len(edges) - 1), edges[:-1], edges[1:]))  # [K, 3, B]
        by_condition = {name: losses[:, i] for i, name in enumerate(("own", "other", "text"))}
        kind = "epsilon" if self.options.target == "eps" else ""
        return by_condition | {"nats_per_loss": self.nats_per_loss(timesteps, edges, latents, kind)}
