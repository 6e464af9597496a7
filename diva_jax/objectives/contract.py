"""The base class of objectives: the interface for the train loop, the step, evaluation and export."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diva_jax.common import fields
from diva_jax.common.errors import UserError, listing
from diva_jax.data import inputs, preprocess
from diva_jax.models import adapters, backbones
from diva_jax.models.diffusion.presets import LatentCode
from diva_jax.weights.parts import Part

_PAGE = "see docs/WRITE_AN_OBJECTIVE.md"
# What the train step, the log and evaluations write themselves, see `training.metrics`.
_OWN_METRICS = set("grad_norm lr step seconds images_per_s mfu data_wait broken_images skipped_images".split())
# Values of switches: what the models were trained on, and what the authors' code does.
EXACT, FAITHFUL = "exact", "faithful"


def switch(doc: str, default: str = EXACT) -> Any:
    """Declares a field that is exact or faithful."""
    return fields.choice((default, *{EXACT, FAITHFUL} - {default}), doc)


def check_both_towers(spec: backbones.Spec, objective: str) -> None:
    """Raises a UserError where a backbone has no text tower, which the objective trains."""
    if not spec.has_text:
        problem = f"config.objective={objective} trains a text tower, but the {spec.arch} backbone has none"
        raise UserError(f"{problem}: use a CLIP backbone")


class Pace(NamedTuple):
    """The numbers of a stage's learning rate. The compiled step has them as an argument: arrays, not constants."""

    peak: jax.Array  # The peak learning rate, float32 [].
    start: jax.Array  # The stage's first step, int32 [].
    steps: jax.Array  # Its number of steps, int32 [].
    warm: jax.Array  # Steps of the warm-up, fewer than `steps`, int32 [].


class Stage(NamedTuple):
    """Consecutive steps with one trainable set, peak learning rate and schedule, and a newly initialised optimizer."""

    name: str  # Shown in the log.
    start: int  # The first global step.
    end: int  # The global step after the last.
    lr: float  # The peak learning rate.
    trainable: tuple[tuple[str, float], ...]  # As `config.trainable`: ((regex, learning-rate scale), ...).
    # The learning rate by step of the stage, from 0 on, and its pace; None: as `config.optim` says.
    rate: Callable[[jax.Array, Pace], jax.Array] | None = None
    schedule: str | None = None  # "cosine" or "constant"; None: as `config.optim` says.
    warmup_steps: int | None = None  # None: as `config.optim` says.

    @property
    def steps(self) -> int:
        """The number of steps."""
        return self.end - self.start


def tune(config, start: int = 0) -> Stage:
    """Returns the stage that trains `config.trainable` for `config.steps` steps, beginning at step `start`."""
    table = tuple((str(p), float(s)) for p, s in config.trainable)
    return Stage("tune", start, start + config.steps, config.optim.lr, table)


def vision_tower(config, spec: backbones.Spec, rngs: nnx.Rngs) -> nnx.Module:
    """Returns the vision tower of an objective, held in float32, with random weights."""
    remat = config.remat in ("vision", "all")
    return backbones.build(spec, rngs=rngs, dtype=jnp.dtype(config.dtype), param_dtype=jnp.float32, remat=remat)


def _checked(loss: Callable) -> Callable:
    """A method `loss` whose result is checked while it is traced."""

    @functools.wraps(loss)
    def checked(self, batch, keys, *progress):
        found = loss(self, batch, keys, *progress)
        if problem := _problem(found):
            where = f"{loss.__code__.co_filename}:{loss.__code__.co_firstlineno}"
            advice = 'return a scalar and a dict of scalars with "loss", such as (loss, {"loss": loss})'
            raise UserError(f"{where}: {problem}: {advice}")
        return found

    return checked


def _problem(found: Any) -> str:
    """What is wrong with the result of a loss; "" where nothing is."""
    if not isinstance(found, tuple) or len(found) != 2:
        what = f"a tuple of {len(found)}" if isinstance(found, tuple) else f"a {type(found).__name__}"
        return f"loss returns {what}, and not the pair (loss, metrics)"
    value, metrics = found
    if not isinstance(metrics, Mapping) or not all(isinstance(name, str) for name in metrics):
        return f"the metrics that loss returns are a {type(metrics).__name__}, and not a dict with texts as keys"
    if "loss" not in metrics:
        return f'the metrics that loss returns ({listing(list(metrics)) or "none"}) lack "loss"'
    if taken := [n for n in metrics if n in _OWN_METRICS or n.startswith(("eval/", "feedback"))]:
        return f"the metrics that loss returns have {listing(taken)}, which a run writes itself"
    for name, number in {"loss": value, **{f"metrics[{n!r}]": m for n, m in metrics.items()}}.items():
        shape, kind = getattr(number, "shape", ()), getattr(number, "dtype", type(number))
        said = getattr(kind, "__name__", kind)  # Of a type its name; a dtype is written as it is.
        if shape != () or not (isinstance(number, float | int) or jnp.issubdtype(kind, jnp.number)):
            return f"{name} is {said} {list(shape)}, and not a scalar"
        if name == "loss" and not jnp.issubdtype(kind, jnp.floating):
            return f"loss is {said}, which has no gradient"
    return ""


class Cacheable(NamedTuple):
    """What frozen models make of a record: an array of the batch that the cache `config.data.latents` can hold."""

    shape: tuple[int, ...]  # The shape of one record's array.
    facts: Mapping[str, Any]  # What it depends on beside the record, its crop and the weights, for JSON.
    parts: Mapping[str, Part]  # Prefix of parameter names -> source, of the models.
    make: Callable[[Mapping[str, jax.Array]], jax.Array]  # Batch -> array [B, *shape].
    reads: tuple[str, ...] = ("image",)  # The inputs that it is made of; "caption": it depends on the record's text.
    tokenizer: Callable[[], str | Path] | None = None  # The folder of what makes a text its input, if any.


@dataclasses.dataclass(frozen=True)
class LatentSource:
    """Where an objective's latents come from: a VAE's shape and the source of its weights, for images of `size` pixels.
    `dtype` and `held` are what the VAE computes in and what its weights are held in; `view` is how its input is made of
    the image, see `preprocess.vae_view`; `cached`: whether moments come with the batch, and the objective has no VAE.
    """

    vae: LatentCode
    part: Part
    size: int
    dtype: str
    held: str
    view: str = "exact"
    cached: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one image's moments: height, width, and the channels of `vae`."""
        side = self.size // self.vae.downscale
        return side, side, self.vae.moment_channels

    @property
    def latents_shape(self) -> tuple[int, int, int]:
        """The shape of one image's latents."""
        return *self.shape[:2], self.vae.latent_channels

    @property
    def pretrained(self) -> Mapping[str, Part]:
        """{"vae": its source}; nothing where moments are cached."""
        return {} if self.cached else {"vae": self.part}


class Progress(NamedTuple):
    """What a loss may know of the run."""

    done: jax.Array  # The share of the stage's steps that are made, float32 [], at least 0 and below 1.
    average: "Objective"  # With the moving average of its trained parameters (`config.ema`), or these themselves.


class Objective(nnx.Module):
    """A loss and the models that it needs. Constructed as `Objective(config, rngs=rngs)` with random weights.

    An objective is independent of meshes, optimizers, files and other objectives. Its constructor runs under
    `nnx.eval_shape` before anything is loaded, and raises a `UserError` if the config is inconsistent."""

    # Whether the loss of an image depends on the other images of its micro-batch (negatives, kernels). Such a loss is
    # computed over the whole global micro-batch, whatever the number of devices.
    compares_images: bool = False
    follows_run: bool = False  # Whether the train step calls `loss` with a third argument, `Progress`; others do not.
    terms_alone: bool = False  # Whether it has no loss of its own, and the terms of the config are all that trains it.
    latent_source: LatentSource | None = None  # Where the latents of the images come from; None: it has none.

    def __init_subclass__(cls, **keywords):
        super().__init_subclass__(**keywords)
        if "loss" in cls.__dict__:
            cls.loss = _checked(cls.loss)

    def __init__(self, config, *, rngs):
        raise NotImplementedError

    @property
    def inputs(self) -> Mapping[str, object]:
        """The contents of a batch: name -> `data.inputs.Image`, `data.inputs.Tokens` or an object like them. They
        determine the data pipeline, the abstract batch of a compilation, and the step. Each batch also has "row": int32
        [B], the row of the image in the global batch. By default they are those of `latent_source`: "image", uint8 [S,
        S, 3] at the VAE's resolution, and "moments" where they are cached."""
        if (source := self.latent_source) is None:
            problem = f"{type(self).__module__}: its Objective does not define inputs, what a batch holds"
            raise UserError(f"{problem}: {_PAGE}")
        image = {"image": inputs.Image(source.size)}
        return image | {"moments": inputs.Cached(source.shape)} if source.cached else image

    def loss(self, batch: Mapping[str, jax.Array], keys: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the loss of one micro-batch.

        Args:
          batch: each input as [B, *shape].
          keys: PRNG keys, one per image, [B]; they depend only on the seed, the step and the row of the image.

        Returns:
          (scalar to differentiate, scalar metrics, which include "loss"). Both are averaged over micro-batches.

        Raises:
          UserError: when it is traced, what it returns is not of this form.
        """
        raise UserError(f"{type(self).__module__}: its Objective does not define loss: {_PAGE}")

    def encode(self, view: jax.Array, tower: str = "vision") -> backbones.Features:
        """What the vision tower of this name, also in profiles, makes of normalised images, [B, S, S, 3]."""
        with jax.named_scope(tower):
            return getattr(self, tower).encode(view)

    def moments(self, pixels: jax.Array) -> jax.Array:
        """What a cache of latents holds, for an objective with a `latent_source` and its VAE, `vae`: the moments of the
        posterior, [B, *latent_source.shape], of images [B, S, S, 3] in [0, 1], with S of `latent_source`."""
        with jax.named_scope("vae"):
            return self.vae.moments(preprocess.vae_view(pixels, self.latent_source.view))

    @property
    def cacheable(self) -> Mapping[str, Cacheable]:
        """Name of an input -> what the cache `config.data.latents` holds for it; where there is none, it is refused.
        With the cache, the objective has these inputs and not the models."""
        source = self.latent_source
        if source is None:
            return {}
        facts = {"vae": dataclasses.asdict(source.vae), "image_size": source.size}
        facts |= {name: getattr(source, name) for name in ("dtype", "held", "view")}
        make = lambda batch: self.moments(preprocess.to_float(batch["image"]))  # noqa: E731
        return {"moments": Cacheable(source.shape, facts, {"vae": source.part}, make)}

    def pretrained(self) -> Mapping[str, Part]:
        """Returns prefix of parameter names -> source of these parameters; all others keep their initial values. The
        longest prefix takes precedence: {"vision": ..., "teacher/vision": ...}."""
        return {}

    def towers(self) -> Mapping[str, nnx.Module]:
        """Returns the tuned model with adapters merged, for evaluation and export.

        "vision" has the parameters of `backbones.build(spec)`, "text" (if it is trained) those of
        `backbones.shared.transformer.Text(spec)`, where spec is that of `config.backbone`. "logit_scale" and
        "logit_bias" are `nnx.Param`s of shape []. Everything else is taken from `config.backbone.source`. A UserError
        where an objective that does not define this has no `vision`."""
        if not hasattr(self, "vision"):
            raise UserError(f"{type(self).__module__}: its Objective has no vision, the tower that is tuned: {_PAGE}")
        return {"vision": adapters.merge(self.vision)}
