"""The diffusion model as a judge of texts: the vision tower learns what a frozen generator says of them.

For an image x and texts c_1 .. c_K that differ in one fact, with the neutral text c_0, which leaves the fact open:
latents z0 = VAE(x); N draws of a timestep t and noise eps, the same for all texts, z_t = sqrt(abar_t) z0 + sqrt(1 -
abar_t) eps;

  error      e_k = sum over draws of w_t mean((UNet(z_t, t, c_k) - target)^2), only forward passes;
  posterior  q = softmax_k(-beta e_k), as diffusion classifiers have it (arXiv 2303.16203);
  weight     a = sigmoid(beta (e_0 - min_k e_k)), the posterior of the best text against the neutral one: near 0
             where no text is true;
  tower      p = softmax_k(scale cos(vision(x), text(c_k))), under the frozen text tower;
  loss       the mean over images of -a sum_k q_k log p_k, plus image_weight times that of
             -a sum_k q_k log r_k, with r_k the softmax over the batch's images of scale cos(vision(x_i), text(c_k)),
             at the text's own image.

No label is used. Only `vision` gets a gradient; `config.anchor` keeps its embeddings near those before tuning.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diva_jax.common import paths
from diva_jax.common.errors import UserError
from diva_jax.common.fields import at_least, between, choice, field, parse
from diva_jax.data import inputs, preprocess
from diva_jax.models.backbones.shared.transformer import Text
from diva_jax.models.diffusion import schedule
from diva_jax.models.diffusion.text_encoder import TextEncoder
from diva_jax.models.layers import Array, widened
from diva_jax.objectives import contract
from diva_jax.objectives.shared import pairs
from diva_jax.objectives.shared.stable_diffusion import StableDiffusionObjective
from diva_jax.weights import parts

SECTIONS = ("diffusion",)
# What is folded into an image's key for the order of its texts; its draws have the first numbers.
_ORDER = 2**31 - 1
# States of as many texts are kept; Stable Diffusion 2.1's take 0.3 MB each in float32.
_MAX_KEPT_TEXTS = 4096


@dataclasses.dataclass(frozen=True)
class JudgeOptions:
    """`config.judge`."""

    texts: str = choice(
        ("edits", "records", "classes"),
        "The texts are the caption and edits of it by the lexicon (edits), the list `texts` of the record (records), "
        "or the template with names of classes (classes).",
    )
    count: int = field(2, "An image has at most this many texts, without the neutral one.", between(2, 64))
    lexicon: str = field("", "The lexicon of edits; if empty, diva_jax/data/edits.json.")
    classes: str = field("", "The names of the classes are in this JSON file, as in eval.zeroshot.classes.")
    template: str = field("a photo of a {}.", "The text of a class, with {} for its name.")
    neutral: str = choice(
        ("auto", "caption", "none"),
        "The neutral text leaves the fact out (auto: the edited word, or what the texts do not have in common), or "
        "is the caption; none: there is none, and every image has the weight 1.",
    )
    draws: int = field(2, "Each image has this many draws of a timestep and noise.", between(1, 1024))
    first_timestep: int = field(300, "Timesteps are drawn from this one on; high noise decides layout.", at_least(0))
    end_timestep: int = field(0, "Timesteps are drawn below this one; 0: from all of the schedule.", at_least(0))
    timestep_weight: str = choice(
        ("equal", "nats"),
        "All timesteps' errors weigh the same (equal), or as they add to the likelihood (nats, with beta=1).",
    )
    beta: float = field(300.0, "The errors are multiplied by this before the softmax.", between(0, 1e38))
    logit_scale: float = field(50.0, "The tower's cosines are multiplied by this before the softmax.", between(0, 1e38))
    image_weight: float = field(0.0, "The choice of a text among the batch's images has this weight.", between(0, 1e38))
    verdict: str = choice(
        ("generator", "shuffled", "first"),
        "The posterior is the generator's; the same in a random order, a control that can teach nothing (shuffled); "
        "or the first text is right (first), for data whose labels are known.",
    )
    tokenizer: str = field("", "The tokenizer's files are in this folder; if empty, they are those of backbone.source.")


SECTION = JudgeOptions


def recipe(config: ConfigDict) -> None:
    """Ours, from small runs; at full size nothing is published."""
    config.steps, config.batch_size = 4000, 256
    config.trainable = (("vision/.*", 1.0), (".*", 0.0))
    config.optim.update(name="adamw", lr=1e-5, weight_decay=0.0)
    config.anchor.update(weight=0.3 * config.backbone.embed_dim, of="unit")  # The term is a mean over dimensions.


@functools.lru_cache
def chooser(o: JudgeOptions) -> inputs.Alternatives:
    """What makes the texts of a record; a UserError where a file is missing or wrong, or no text known to be right."""
    of_caption = o.neutral == "caption"
    if o.texts == "edits":
        return inputs.Edits(o.count, of_caption, paths.expanded(o.lexicon) if o.lexicon else inputs.LEXICON)
    if o.texts == "records":
        return inputs.Listed(o.count, of_caption)
    if o.verdict == "first":
        problem = "config.judge.verdict=first takes the first text for right, and classes are in a random order"
        raise UserError(f"{problem}: use config.judge.texts=records")
    return inputs.Classes.read(o.count, of_caption, o.classes, o.template)


def validate(config: ConfigDict) -> None:
    """Raises a UserError where the texts cannot be made, see `chooser`."""
    chooser(parse(JudgeOptions, config.judge, "config.judge"))


class JudgeDraws(NamedTuple):
    """The random numbers of N draws for B images: timesteps int32 [N, B], standard normal noise [N, B, h, w, c]."""

    timesteps: Array
    noise: Array


def posterior(errors: Array, present: Array, beta: float) -> tuple[Array, Array]:
    """(posterior over the texts [B, K], weight of each image [B]) of errors [B, K + 1], the neutral text's last.
    `present` is bool [B, K + 1]: without a neutral text the weight is 1, with fewer than two texts it is 0."""
    kept = jnp.where(present, -beta * errors, -jnp.inf)
    texts, neutral = kept[:, :-1], kept[:, -1]
    weight = jnp.where(jnp.sum(present[:, :-1], axis=1) > 1, jax.nn.sigmoid(jnp.max(texts, axis=1) - neutral), 0)
    return jax.nn.softmax(jnp.where(jnp.any(present[:, :-1], axis=1, keepdims=True), texts, 0), axis=1), weight


def shuffled(values: Array, present: Array, keys: Array) -> Array:
    """Values [B, K] of the texts that are present, of each image in a random order; keys [B]."""

    def one(values, present, key):
        drawn = jax.random.uniform(key, values.shape)
        to, source = (jnp.argsort(jnp.where(present, x, jnp.inf)) for x in (jnp.arange(len(values)), drawn))
        return values.at[to].set(values[source])

    return jax.vmap(one)(values, present, keys)


class Objective(StableDiffusionObjective):
    """`vision` is what is usually trained."""

    def __init__(self, config, *, rngs):
        self.options = parse(JudgeOptions, config.judge, "config.judge")
        super().__init__(config, config.data.image_size)
        every = chooser(self.options).every
        self.prompts = every if len(every) <= _MAX_KEPT_TEXTS else ()
        self.compares_images = self.options.image_weight > 0
        self.check_timesteps("judge")
        self.vision = contract.vision_tower(config, self.spec, rngs)
        kw = dict(rngs=rngs, dtype=self.dtype, param_dtype=jnp.dtype(config.frozen_dtype))
        self.text = Text(self.spec, **kw)
        self.build_generator(config, rngs)
        if not self.prompts:
            self.text_encoder = TextEncoder(self.diffusion.text_encoder, **kw)

    @property
    def inputs(self) -> Mapping[str, inputs.Input]:
        """{"image": uint8 [S, S, 3]}, "moments" where they are cached, and token ids of the texts and the neutral text,
        int32 [count + 1, N]: "texts" for the text tower, "conditions" for the generator, or in place of these the
        numbers of kept states, [count + 1, 1]."""
        text, d, count, choose = self.spec.text, self.diffusion, self.options.count, chooser(self.options)
        own = parts.tokenizer(self.spec.source, text, self.options.tokenizer, "config.judge.tokenizer")
        generator = functools.partial(parts.prompt_tokenizer, d.source, d.text_tokens, d.text_encoder)

        def numbered():
            _, first, of = np.unique(generator()(self.prompts), axis=0, return_index=True, return_inverse=True)
            number = dict(zip(self.prompts, first[of], strict=True))
            return lambda texts: np.array([[number.get(text, -1)] for text in texts], np.int32)

        conditions = (1, numbered) if self.prompts else (d.text_tokens, generator)
        return {
            **super().inputs,
            "texts": inputs.Texts(count, text.context_length, own, choose),
            "conditions": inputs.Texts(count, *conditions, choose),
        }

    def pretrained(self) -> Mapping[str, parts.Part]:
        """See `contract.Objective`; every parameter has a source."""
        d = self.diffusion
        encoder = parts.diffusers(d.source, d.text_encoder, "config.diffusion.text_encoder")
        found = {**super().pretrained(), "text": parts.text(self.spec.source, self.spec)}
        return found if self.prompts else {**found, "text_encoder": encoder}

    def draw(self, keys: Array, latents_shape: tuple[int, int, int], count: int | None = None) -> JudgeDraws:
        """N draws (`count`, or config.judge.draws) from one key per image, [B]."""

        def one(key):
            t, eps = jax.random.split(key)
            timestep = jax.random.randint(t, (), *self.timestep_range)
            return JudgeDraws(timestep, jax.random.normal(eps, latents_shape, jnp.float32))

        n = count or self.options.draws
        return jax.vmap(jax.vmap(one))(jax.vmap(lambda key: jax.random.split(key, n), out_axes=1)(keys))

    def errors(self, latents: Array, ids: Array, drawn: JudgeDraws) -> Array:
        """The error of each image, [B], under texts with the generator's token ids, int32 [B, T], or with the numbers
        of kept states, [B, 1]."""
        with jax.named_scope("text_encoder"):
            context = self.text_context[...][ids[:, 0]].astype(self.dtype) if self.prompts else self.text_encoder(ids)
        weights = np.ones(self.timesteps)
        if self.options.timestep_weight == "nats":
            low, high = self.timestep_range
            each = schedule.nats_per_error(self.diffusion.scheduler, latents[0].size)
            weights = each * (high - low) / len(drawn.timesteps)

        def one_draw(draw: JudgeDraws) -> Array:
            pred = self.run_unet(self.noisy(latents, draw.noise, draw.timesteps), draw.timesteps, context)
            wrong = jnp.square(widened(pred) - self.target(latents, draw.noise, draw.timesteps))
            return jnp.mean(wrong, axis=(1, 2, 3)) * jnp.asarray(weights, wrong.dtype)[draw.timesteps]

        return jnp.sum(jax.lax.map(one_draw, drawn), axis=0)

    def judge(self, batch: Mapping[str, Array], pixels: Array, keys: Array) -> tuple[Array, Array]:
        """(posterior over the texts [B, K], weight of each image [B]), see `posterior`."""
        ids = batch["conditions"]
        # A text must be one to both tokenizers.
        present = (ids[..., 0] >= 0) & (batch["texts"][..., 0] >= 0)
        present = present.at[:, -1].set(self.options.neutral != "none")
        if self.options.verdict == "first":
            first = jnp.zeros(present[:, :-1].shape, jnp.float32).at[:, 0].set(1)
            return first, jnp.where(jnp.sum(present[:, :-1], axis=1) > 1, 1.0, 0.0)
        latents = self.latents(pixels, batch.get("moments"))
        drawn = self.draw(keys, latents.shape[1:])
        asked = ids if self.options.neutral != "none" else ids[:, :-1]
        errors = jax.lax.map(lambda i: self.errors(latents, i, drawn), jnp.maximum(asked, 0).swapaxes(0, 1)).T
        if asked is not ids:
            errors = jnp.pad(errors, ((0, 0), (0, 1)))
        found, weight = posterior(errors, present, self.options.beta)
        if self.options.verdict == "shuffled":
            found = shuffled(found, present[:, :-1], jax.vmap(jax.random.fold_in, (0, None))(keys, _ORDER))
        return found, weight

    def loss(self, batch: Mapping[str, Array], keys: Array) -> tuple[Array, dict[str, Array]]:
        """See `contract.Objective`. The metrics are "loss", "loss_text", "loss_image" (if it has a weight), "weight"
        (the images' mean weight), "certainty" (the mean of the largest posterior) and "agreement" (how often the tower
        prefers the same text as the judge), both over the images by their weights."""
        o, s, pixels = self.options, self.spec, preprocess.to_float(batch["image"])
        found, weight = jax.lax.stop_gradient(self.judge(batch, pixels, keys))
        ids, present = batch["texts"][:, :-1], found > 0
        with jax.named_scope("text"):
            texts = pairs.unit(self.text.encode(jnp.maximum(ids, 0).reshape(-1, ids.shape[-1])))
        images = pairs.unit(self.encode(preprocess.backbone_view(pixels, s.image_size, s.mean, s.std, "exact")).pooled)
        texts = jax.lax.stop_gradient(texts).reshape(*found.shape, -1)  # [B, K, D]
        logits = o.logit_scale * jnp.einsum("bd,bkd->bk", images, texts, precision="highest")
        logits = jnp.where(jnp.min(ids, axis=-1) >= 0, logits, -jnp.inf)
        terms = jnp.where(present, found * jax.nn.log_softmax(logits, axis=1), 0)
        value = by_text = -jnp.mean(weight * jnp.sum(terms, axis=1))
        total = jnp.maximum(jnp.sum(weight), 1e-6)
        agrees = jnp.argmax(logits, axis=1) == jnp.argmax(found, axis=1)
        metrics = {
            "loss_text": by_text,
            "weight": jnp.mean(weight),
            "certainty": jnp.sum(weight * jnp.max(found, axis=1)) / total,
            "agreement": jnp.sum(weight * agrees) / total,
        }
        if o.image_weight:
            among = o.logit_scale * jnp.einsum("id,bkd->bki", images, texts, precision="highest")
            own = jnp.diagonal(jax.nn.log_softmax(among, axis=-1), axis1=0, axis2=2).T  # [B, K]
            metrics["loss_image"] = -jnp.mean(weight * jnp.sum(found * own, axis=1))
            value = value + o.image_weight * metrics["loss_image"]
        return value, {"loss": value, **metrics}
