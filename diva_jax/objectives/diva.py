"""DIVA (arXiv 2407.20171): the diffusion loss of a frozen U-Net, conditioned on CLIP's own tokens.

For an image x: latents z0 = VAE(x); for each of N draws a timestep t and noise eps, z_t = sqrt(abar_t) z0 +
sqrt(1 - abar_t) eps; condition c = text + visual_proj(tokens of vision(x)); loss = mean((UNet(z_t, t, c) -
target)^2) (section 3.1, equations 1 to 4), target eps or, for a v-prediction model, v. The gradient runs
through the U-Net into `visual_proj` and `vision`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from diva_jax.common.errors import UserError
from diva_jax.common.fields import at_least, between, choice, field, parse
from diva_jax.data import preprocess
from diva_jax.models.backbones import Features
from diva_jax.models.diffusion.flow import TorchLayers
from diva_jax.models.layers import Array, widened
from diva_jax.objectives import contract
from diva_jax.objectives.contract import EXACT, switch
from diva_jax.objectives.shared.stable_diffusion import StableDiffusionObjective, view_stats, weighted_sum

SECTIONS = ("condition", "diffusion")


@dataclasses.dataclass(frozen=True)
class DivaOptions:
    """`config.diva`. "faithful" is what the authors' code does, "exact" what the models were trained on."""

    draws: int = field(2, "Each image has this many draws of a timestep and noise.", between(1, 1024))
    first_timestep: int = field(0, "Timesteps are drawn from this one on.", at_least(0))
    end_timestep: int = field(0, "Timesteps are drawn below this one; 0: from all of the schedule.", at_least(0))
    condition_of: str = choice(
        ("own", "next"),
        "The condition is the image's own, or that of the next image in the batch, a control that can teach nothing.",
    )
    vae_view: str = switch(
        "The VAE's input is 2x - 1 of the image (exact), or goes through CLIP's and back by ImageNet's mean and std "
        "(faithful)."
    )
    backbone_stats: str = switch("The backbone's input has its own mean and std (exact), or OpenAI's (faithful).")
    backbone_resize: str = switch(
        "The backbone's input is resized by antialiased bicubic interpolation and then normalised (exact), or "
        "normalised and then resized bilinearly (faithful)."
    )
    draw_weights: str = switch(
        "The draws' losses are averaged (exact), or summed over micro-batches with the last one weighted by 1 / "
        "accum (faithful)."
    )
    backbone_passes: str = switch("The draws share one pass of the backbone (exact), or have one each (faithful).")


SECTION = DivaOptions


def recipe(config: ConfigDict) -> None:
    """The published recipe (DIVA, section 4.1): about one epoch of CC3M at 640 images per step."""
    config.steps, config.batch_size, config.accum = 4600, 640, 5
    config.trainable = (("vision/.*", 1.0), ("visual_proj/.*", 1.0), (".*", 0.0))
    config.optim.update(name="sgd", lr=1e-4, momentum=0.9, weight_decay=0.0, warmup=0.005, clip=1.0)


def stages(config: ConfigDict) -> tuple[contract.Stage, ...]:
    """`visual_proj` alone for condition.warmup_steps, then the trainable table."""
    warm = config.condition.warmup_steps
    main = contract.tune(config, warm)
    alone = (("visual_proj/.*", 1.0), (".*", 0.0))
    return (contract.Stage("visual_proj", 0, warm, config.condition.warmup_lr, alone), main) if warm else (main,)


class DivaDraws(NamedTuple):
    """The random numbers of one draw for B images, or of N (a leading axis): timesteps [B], int32; standard normal
    noise [B, h, w, c]; patch indices [B, K], int32, uniform with replacement, or None where no token is drawn."""

    timesteps: Array
    noise: Array
    token_indices: Array | None


def parse_select(select: str) -> tuple[str, int]:
    """Parses `Spec.select`: "all" -> ("all", 0), "none" -> ("none", 0), "random:76" -> ("random", 76)."""
    kind, _, count = select.partition(":")
    return kind, int(count or 0)


def token_count(select: str, patches: int) -> int:
    """Returns the number of tokens in the condition, including the pooled token."""
    kind, k = parse_select(select)
    return 1 + {"all": patches, "none": 0, "random": k, "runs": patches // max(k, 1)}[kind]


def select_tokens(features: Features, select: str, indices: Array | None = None) -> Array:
    """Features that condition the U-Net, pooled token first, [B, `token_count`, D]; `indices` [B, K] if drawn."""
    kind, k = parse_select(select)
    tokens = features.tokens
    if kind == "random":
        tokens = jnp.take_along_axis(tokens, indices[:, :, None], axis=1)
    elif kind == "none":
        tokens = tokens[:, :0]
    elif kind == "runs":
        b, p, d = tokens.shape
        tokens = tokens[:, : p // k * k].reshape(b, p // k, k, d).mean(axis=2)
    return jnp.concatenate([features.pooled[:, None], tokens], axis=1)


def add_text(projected: Array, text: Array, how: str) -> Array:
    """The U-Net's condition, [B, n, C], of projected features and the prompt's states, [1, T, C], which are added token
    by token ("token", n == T), or their mean to each token ("mean")."""
    if how == "mean":
        text = text.mean(axis=1, keepdims=True)
    return projected + text.astype(projected.dtype)


def check_fit(select: str, how: str, patches: int, text_tokens: int) -> None:
    """Raises a UserError where features and text are added token by token and their numbers differ."""
    n = token_count(select, patches)
    if how == "token" and n != text_tokens:
        problem = f"backbone.add_text=token needs {text_tokens} feature tokens, as many as the prompt has"
        advice = f"use add_text=mean or select=random:{text_tokens - 1}"
        raise UserError(f"{problem}, but backbone.select={select} gives {n}: {advice}")


class Objective(StableDiffusionObjective):
    """`vision` and `visual_proj` are what is usually trained."""

    def __init__(self, config, *, rngs):
        self.options = parse(DivaOptions, config.diva, "config.diva")
        super().__init__(config, config.data.image_size, self.options.vae_view)
        self.accum, self.compares_images = config.accum, self.options.condition_of == "next"
        self.check_timesteps("diva")
        check_fit(self.spec.select, self.spec.add_text, self.spec.patches, self.diffusion.text_tokens)
        self.vision = contract.vision_tower(config, self.spec, rngs)
        layers = TorchLayers(rngs, self.dtype)
        self.visual_proj = layers.linear(self.spec.embed_dim, self.diffusion.unet.cross_attention_dim)
        self.build_generator(config, rngs)

    def draw(self, keys: Array, latents_shape: tuple[int, int, int], count: int | None = None) -> DivaDraws:
        """N draws (`count`, or config.diva.draws) from one key per image, [B]; each depends on that key alone."""
        kind, k = parse_select(self.spec.select)

        def one(key):
            t, eps, tokens = jax.random.split(key, 3)
            noise = jax.random.normal(eps, latents_shape, jnp.float32)
            timestep = jax.random.randint(t, (), *self.timestep_range)
            patches = jax.random.randint(tokens, (k,), 0, self.spec.patches) if kind == "random" else None
            return DivaDraws(timestep, noise, patches)

        n = count or self.options.draws
        return jax.vmap(jax.vmap(one))(jax.vmap(lambda key: jax.random.split(key, n), out_axes=1)(keys))

    def view(self, pixels: Array) -> Array:
        """Pixels [B, S, S, 3] in [0, 1] -> the backbone's input, normalised."""
        stats = view_stats(self.spec, self.options.backbone_stats)
        return preprocess.backbone_view(pixels, self.spec.image_size, *stats, self.options.backbone_resize)

    def weights(self) -> Array:
        """The weight of each draw's loss in the gradient, [N]. The step averages over A micro-batches, so `faithful`,
        where the last draw alone is divided by A and everything is summed, reads (A, ..., A, 1)."""
        n = self.options.draws
        if self.options.draw_weights == EXACT:
            return jnp.full((n,), 1 / n, jnp.float32)
        return jnp.asarray([self.accum] * (n - 1) + [1], jnp.float32)

    def context(self, visual_proj: nnx.Module, seen: Features, draw: DivaDraws) -> tuple[Array, Array]:
        """What the encoder sees -> (its tokens that condition the U-Net [B, n, D], the condition [B, n, C])."""
        f = select_tokens(seen, self.spec.select, draw.token_indices)
        return f, add_text(visual_proj(f), self.text_context[...], self.spec.add_text)

    def denoise(self, latents: Array, draw: DivaDraws, context: Array) -> tuple[Array, Array]:
        """(what the U-Net predicts from a draw's noisy latents, what it should), [B, h, w, c], float32 or wider."""
        pred = self.run_unet(self.noisy(latents, draw.noise, draw.timesteps), draw.timesteps, context)
        return widened(pred), self.target(latents, draw.noise, draw.timesteps)

    def forward(self, pixels: Array, drawn: DivaDraws, moments: Array | None = None) -> tuple[Array, dict]:
        """The loss of pixels [B, S, S, 3] in [0, 1] under N stacked draws, and everything on the way to it. `moments`
        of the VAE's posterior, [B, h, w, 2 c], are computed where they are not given. Returns (weighted sum of the
        draws' losses, {latents [B, h, w, c]; and by draw: features [N, B, n, D], context [N, B, n, C], pred_noise [N,
        B, h, w, c], losses [N]})."""
        view, latents = self.view(pixels), self.latents(pixels, moments)
        shared = self.options.backbone_passes == EXACT

        def encode(vision):
            with jax.named_scope("vision"):
                seen = vision.encode(view)
            if self.options.condition_of == "next":
                seen = jax.tree.map(lambda x: jnp.roll(x, -1, axis=0), seen)
            return seen

        # A draw is differentiated with respect to the projection and the features, or to the projection and the
        # encoder, which each draw then runs itself.
        graph, params = nnx.split((self.visual_proj,) if shared else (self.visual_proj, self.vision))
        given = params, encode(self.vision) if shared else None

        def one_draw(given, draw: DivaDraws):
            params, features = given
            visual_proj, *own = nnx.merge(graph, params)
            f, c = self.context(visual_proj, features or encode(*own), draw)
            pred, goal = self.denoise(latents, draw, c)
            loss = jnp.mean(jnp.square(pred - goal))
            return loss, {"features": f, "context": c, "pred_noise": pred, "losses": loss}

        value, seen = weighted_sum(one_draw, given, drawn, self.weights())
        return value, {"latents": latents, **seen}

    def loss(self, batch: dict, keys: Array) -> tuple[Array, dict]:
        """See `contract.Objective`; the metric "loss" is the plain mean over images and draws, without weights."""
        value, seen = self.forward(*self.draw_for(batch, keys), batch.get("moments"))
        return value, {"loss": jnp.mean(seen["losses"])}

    def condition_losses(self, batch: dict, keys: Array, edges: np.ndarray) -> dict[str, Array]:
        """The loss of each image under its own condition, under another image's, and under the text alone: {"own",
        "other", "text", "nats_per_loss" (see the method of this name): [K, B]}. The batch is {"image", "other": uint8
        [B, S, S, 3]}, `other` being whose condition is borrowed; the keys are one per image, [B]; the timestep of draw
        k is uniform in edges[k] .. edges[k + 1] - 1. Timesteps, noise and token draw are the same under all three
        conditions. For the text alone the visual part is zero: the condition is the prompt's states as they are
        (`add_text` token), or their mean in every one of its tokens (mean)."""
        pixels = [preprocess.to_float(batch[k]) for k in ("image", "other")]
        latents = self.latents(pixels[0])
        both = jax.lax.map(self.vision.encode, jnp.stack([self.view(p) for p in pixels]))
        seen = [Features(*(x[i] for x in both)) for i in (0, 1)]
        drawn = self.draw(keys, latents.shape[1:], len(edges) - 1)
        low, high = self.timestep_range
        within = (drawn.timesteps - low) * np.diff(edges)[:, None] // (high - low)
        drawn = drawn._replace(timesteps=(edges[:-1, None] + within).astype(jnp.int32))

        def loss(draw: DivaDraws, context: Array) -> Array:
            pred, goal = self.denoise(latents, draw, context)
            return jnp.mean(jnp.square(pred - goal), axis=(1, 2, 3))

        def one_draw(draw: DivaDraws) -> Array:
            own, other = (self.context(self.visual_proj, f, draw)[1] for f in seen)
            text = add_text(jnp.zeros_like(own), self.text_context[...], self.spec.add_text)
            return jax.lax.map(lambda context: loss(draw, context), jnp.stack([own, other, text]))  # [3, B]

        losses = jax.lax.map(one_draw, drawn)
        by_condition = {name: losses[:, i] for i, name in enumerate(("own", "other", "text"))}
        return by_condition | {"nats_per_loss": self.nats_per_loss(drawn.timesteps, edges, latents)}
