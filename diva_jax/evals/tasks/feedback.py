"""Whether the diffusion feedback is signal or noise, which decides if DIVA can improve an encoder: the gradient through
a U-Net that ignores its condition is noise. docs/EVALUATION.md defines the condition gaps and the gradients' agreement.

Information: the gaps, weighted and summed over all timesteps, in nats per image (I-MMSE, arXiv 2302.03792, and
`schedule.nats_per_error`). `gradient_cosine` is the mean cosine c of a group's gradients under two independent draws:
for gradients that are a signal s, the same for each draw, plus independent noise n, c is |s|^2 / (|s|^2 + |n|^2), so
that `gradient_snr`, c / (1 - c), is |s|^2 / |n|^2. Everything is computed in `config.dtype`, as in training; the random
numbers of an image depend only on the seed and on the image's own number.
"""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec as P
from ml_collections import ConfigDict

from diva_jax.common.errors import UserError, explained, listing
from diva_jax.common.fields import at_least, field
from diva_jax.common.json_files import packaged
from diva_jax.data import files, images, sources
from diva_jax.evals import Outcome, Settings, Task, encode, resolved, stats
from diva_jax.training import workdirs
from diva_jax.training.step import Program, image_keys

TIMESTEP_BINS = 10
# Number of images of one gradient.
_GROUP_SIZE = 8
METRICS = packaged(__file__, "feedback.json")["metrics"]
# What it means that the interval of a metric includes zero.
_ZERO_MEANS = packaged(__file__, "feedback.json")["zero_means"]


@dataclasses.dataclass(frozen=True)
class FeedbackOptions:
    """The section `config.eval.feedback`."""

    images: int = field(256, "At most this many images are used, chosen by the seed and kept in memory.", at_least(2))
    draws: int = field(4, "Gradients are compared between this many draws on the same images.", at_least(2))


def partners(count: int, seed: int) -> np.ndarray:
    """The image whose condition stands for another's, int [count]: the next in a random cycle, never itself."""
    order = np.random.default_rng(seed).permutation(count)
    out = np.empty(count, int)
    out[order] = np.roll(order, -1)
    return out


def mean_cosine(gradient: Callable, draws, like):
    """The mean cosine of all pairs of R gradients, with the memory of two, and the R norms; undefined where one is
    zero. Of unit vectors u, |sum u|^2 = R + the cosines of all ordered pairs. `gradient` is one draw -> pytree as
    `like`; `draws` have a leading axis [R, ...]."""

    def add(total, draw):
        g = gradient(draw)
        norm = optax.tree.norm(g)
        scale = 1 / jnp.where(norm > 0, norm, 1)
        return jax.tree.map(lambda a, b: a + scale * b, total, g), norm

    total, norms = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, like), draws)
    r = len(norms)
    return (optax.tree.norm(total, squared=True) - r) / (r * (r - 1)), norms


class Feedback(Task):
    """The task on `path`, of any form that `config.data.path` may have. It is not compared in training: the losses
    depend on the projection too, and that of the first step is not kept."""

    title, items, compared_in_training = "Diffusion feedback", "images", False

    def __init__(self, path: str, section: ConfigDict, settings: Settings):
        try:
            source = sources.open_source(path)
        except UserError as e:
            raise UserError(str(e).replace("config.data.path", "--data=feedback")) from e
        if len(source) < 2:
            raise UserError(f"--data=feedback={path} has {len(source)} images: give at least 2")
        self.options, self.settings, self.data = FeedbackOptions(**section), settings, resolved(path)
        self._source = source
        # Not the first ones: data sets are often sorted by class.
        self._records = np.sort(np.random.default_rng(settings.seed).permutation(len(source))[: self.options.images])
        self.count = len(self._records)
        self.names = [source.name(int(i)) for i in self._records]
        self.partners = partners(self.count, settings.seed)
        self.metrics = {m: {"title": t, "unit": "nats" * m.startswith("nats_")} for m, t in METRICS.items()}
        self.metrics["loss_own"]["better"] = "lower"
        self._group = min(_GROUP_SIZE, self.count)

    def bind(self, config, mesh) -> None:
        """Reads the images, at the resolution of training; a UserError where the objective lacks what is needed."""
        config = config.copy_and_resolve_references()
        config.data.latents = ""  # That cache is of the training data, not of these images.
        self.config, self.mesh = config, mesh
        self.program = Program(config, mesh, self.workdir)
        objective = self.program.objective
        needed = self.program.towers.needs("vision")
        self._encoder = [n for n in self.program.trained if n in needed]
        if not hasattr(objective, "condition_losses") or not self._encoder or set(objective.inputs) != {"image"}:
            problem = f"feedback cannot judge config.objective={config.objective!r}, which lacks condition_losses"
            raise UserError(f"{problem}, a trained vision tower, or a loss of images alone: leave feedback out")
        self.edges = np.arange(TIMESTEP_BINS + 1) * objective.timesteps // TIMESTEP_BINS
        self._frozen: dict[str, jax.Array] = {}
        with ThreadPoolExecutor(files.THREADS) as pool:
            self._pixels = list(pool.map(self._read, self._records))

        def losses(module, own, other, keys):
            found = module.condition_losses(dict(image=own, other=other), jax.random.wrap_key_data(keys), self.edges)
            return jax.tree.map(jnp.transpose, found)  # [B, BINS] each.

        everywhere = NamedSharding(mesh, P())
        self._losses = self.program.jitted(losses, out_shardings=everywhere)
        self._cosines = jax.jit(self._gradient_step, out_shardings=everywhere)

    def _read(self, record: int) -> np.ndarray:
        """The centre square at the VAE's resolution, uint8 [S, S, 3]."""
        name = f"{self._source.name(int(record))} of {self.data}"
        with explained(f"the image {name} cannot be read", "fetch it again", OSError, ValueError):
            data = self._source.read(int(record), with_text=False).image
        image = images.open_image(data, name, rgb=True)
        return images.prepare(image, self.config.data.image_size, "shortest", "bicubic")

    def _keys(self, use: int, numbers: Sequence[int]) -> np.ndarray:
        """Key data, one key per image; it depends only on the seed, the use and the image's number."""
        seed = jax.random.key_data(jax.random.key(self.settings.seed))
        return np.asarray(jax.random.key_data(image_keys(seed, use, jnp.asarray(numbers))))

    def _gradient_step(self, arrays, own, keys):
        """keys: key data [R, B, ...] -> (mean cosine, norms [R])."""
        trained = {n: arrays[n] for n in self._encoder}

        def gradient(keys):
            def loss(trained):
                module = self.program.skeleton.merge(arrays, trained)
                return module.loss({"image": own}, jax.random.wrap_key_data(keys))[0]

            return jax.grad(loss)(trained)

        with self.program.tracing():
            return mean_cosine(gradient, keys, trained)

    def _arrays(self, model) -> tuple[dict[str, jax.Array], list[str]]:
        """(every parameter of the objective, notes on those that these weights lack). What is missing comes from its
        source, the encoder's from where these weights began; the rest is the same for all weights and loaded once."""
        wanted, encoder, program = self.program.arrays, model.encoder, self.program
        mine = {n: a for n, a in encoder.params.items() if n in wanted}
        if wrong := [n for n, a in mine.items() if a.shape != wanted[n].shape]:
            raise UserError(f"{model.label}: {listing(wrong, 3)} has another shape than --config says: give its config")
        if encoder.base != self.config.backbone.source:
            config = self.config.copy_and_resolve_references()
            config.backbone.source = encoder.base
            program = Program(config, self.mesh)
        parts, owners = program.objective.pretrained(), workdirs.owners(program)
        missing = wanted.keys() - mine.keys()
        of_base = {n for n in missing if n in owners and parts[owners[n]].source == encoder.base}
        loaded = workdirs.initial_arrays(program, missing - self._frozen.keys(), every_source=False)[0]
        self._frozen |= {n: a for n, a in loaded.items() if n not in of_base}
        arrays = {n: a for n, a in (self._frozen | loaded).items() if n in missing} | mine
        # Parameters that start fresh and are not part of the encoder: projections into the U-Net.
        fresh = {n.split("/")[0] for n in missing if n not in owners}
        fresh -= {n.split("/")[0] for t in program.towers.shapes for n in program.towers.needs(t)}
        notes = []
        if fresh:
            seed = self.config.seed
            notes = [f"these weights have no {listing(sorted(fresh))}: the random one of config.seed={seed} is used"]
        elif encoder.borrowed:
            notes = [f"these weights have no projection into the U-Net: the one trained by {encoder.borrowed} is used"]
        return arrays, notes

    def _gradients(self, arrays, label: str) -> np.ndarray:
        """Mean cosine of each group, [groups]; NaN where a gradient is zero. Images that do not fill a group are
        omitted. A group is repeated to a multiple of the number of devices; its mean gradient stays the same."""
        copies = np.lcm(self._group, self.mesh.size) // self._group
        out = []
        for first in range(0, self.count - self._group + 1, self._group):
            rows = list(range(first, first + self._group)) * copies
            keys = np.stack([self._keys(1 + r, rows) for r in range(self.options.draws)])
            pixels = encode.spread([self._pixels[i] for i in rows], self.mesh)
            cosine, norms = jax.device_get(self._cosines(arrays, pixels, keys))
            encode.require_finite(norms, label, "draws", "gradients")
            out.append(cosine if (norms > 0).all() else np.nan)
        return np.array(out, np.float64)

    def _score(self, values: np.ndarray) -> dict[str, Any]:
        """The mean of the values that are known, and its interval, for which there must be two."""
        values = values[~np.isnan(values)]
        if len(values) == 1:
            return {"score": stats.mean(values), "interval": None}
        return stats.estimate(values, scale=1.0, resamples=self.settings.bootstrap, seed=self.settings.seed)

    def evaluate(self, model) -> Outcome:
        """Losses, gaps and agreement of gradients, with intervals over images (groups of images for the latter)."""
        arrays, notes = self._arrays(model)
        others, keys = [self._pixels[i] for i in self.partners], self._keys(0, range(self.count))
        items = list(zip(self._pixels, others, keys, strict=True))
        found = list(model.towers.outputs(partial(self._losses, arrays), items.__getitem__, self.count, *items[0]))
        losses = {name: np.concatenate([part[name] for part in found]).astype(np.float64) for name in found[0]}
        weights = losses.pop("nats_per_loss", None)
        for values in losses.values():
            encode.require_finite(values, model.label, "images", "diffusion losses")
        values = {"loss_own": losses["own"]} | {f"gap_{k}": losses[k] - losses["own"] for k in ("other", "text")}
        if weights is not None:
            values |= {f"nats_{k}": weights * values[f"gap_{k}"] for k in ("other", "text")}
        # Nats add up over the timesteps; losses are averaged.
        by_image = {n: v.sum(axis=1) if n.startswith("nats_") else v.mean(axis=1) for n, v in values.items()}
        scores = {name: self._score(v) for name, v in by_image.items()}
        bins = [
            {"low": int(low), "high": int(high), "scores": {n: self._score(v[:, k]) for n, v in values.items()}}
            for k, (low, high) in enumerate(zip(self.edges, self.edges[1:], strict=False))
        ]
        held = by_image | {"gradient_cosine": self._gradients(arrays, model.label)}
        if np.isnan(held["gradient_cosine"]).all():
            notes.append("the encoder's gradient is zero: the U-Net does not use its condition, nothing can be learned")
        else:
            scores["gradient_cosine"] = cosine = self._score(held["gradient_cosine"])
            if max([cosine["score"], *(cosine["interval"] or [])]) < 1:
                ends = cosine["interval"] and [c / (1 - c) for c in cosine["interval"]]
                scores["gradient_snr"] = {"score": cosine["score"] / (1 - cosine["score"]), "interval": ends}
        for name, means in _ZERO_MEANS.items():
            ends = scores.get(name, {}).get("interval")
            if ends and ends[0] <= 0 <= ends[1]:
                zero = f"the {METRICS[name]} is zero within its interval ({ends[0]:.3g} to {ends[1]:.3g})"
                notes.append(f"{zero}: {means}")
        rows = [
            {"weights": model.label, "metric": f"loss_{condition}", "item": i, "file": file}
            | {"score": float(x[i, b]), "timesteps": f"{self.edges[b]}-{self.edges[b + 1] - 1}"}
            for condition, x in losses.items()
            for i, file in enumerate(self.names)
            for b in range(TIMESTEP_BINS)
        ]
        return Outcome({"scores": scores, "timesteps": bins, "notes": notes}, rows, held)

    def compare(self, before: Outcome, after: Outcome) -> dict:
        """Differences on the same images, timesteps and noise."""
        scores = {}
        for name, values in after.held.items():
            change = values - before.held[name]
            if not np.isnan(change).all():
                score = self._score(change)
                scores[name] = {"difference": score["score"], "interval": score["interval"], "mcnemar": None}
        return {"scores": scores}

    def scalars(self, name: str, outcome: Outcome) -> dict[str, dict[str, Any]]:
        """`feedback/METRIC`, and for each bin `feedback_by_timestep/METRIC/LOW-HIGH`."""
        out = {f"{name}/{m}": s for m, s in outcome.results["scores"].items()}
        for b in outcome.results["timesteps"]:
            out |= {f"{name}_by_timestep/{m}/{b['low']:03}-{b['high'] - 1:03}": s for m, s in b["scores"].items()}
        return out


SECTION, prepare = FeedbackOptions, Feedback
