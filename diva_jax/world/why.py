"""Measures why a method gains or not in the small world: python -m diva_jax.world.why --out=runs/world_why

Three measurements at the kept CLIP, before the first step of tuning, of each arm that has a vision tower to tune:

  information  what feedback can tell of a fact, in nats per image: the log-likelihood ratio of an image under its own
               condition and under that of the same scene with the fact changed (I-MMSE, see EVALUATION.md). Beside it
               stands what the generator knows when it is told in words, an upper bound.
  direction    the cosine, mean over pairs of scenes that differ in the fact, of the change of the difference of their
               embeddings by one step against the mean gradient, and the difference of their texts' embeddings. A
               text can only distinguish the two images along this difference.
  noise        the gradient noise scale (arXiv 1812.06162, equation 2.9): the number of images in a batch at which
               noise and signal have equal power.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from diva_jax import world
from diva_jax.common.errors import UserError, listing
from diva_jax.common.log import say
from diva_jax.data import preprocess
from diva_jax.evals import stats
from diva_jax.world import arms, blindness, captions, drawing, scenes, tuning
from diva_jax.world.knowledge import BINS, Generator

SEED = 9301
GROUPS, IMAGES = 24, 128  # Number of gradients, and of images of each.
COUNT = 256  # Scenes per fact.
_RESAMPLES = 2000
_SHARE = 1e-3
Arrays = Mapping[str, jax.Array]  # Name -> array.


def information(tuner: tuning.Tuner, arrays: Arrays, fact: str) -> np.ndarray:
    """What the condition of an arm with a diffusion model tells of a fact, in nats, [COUNT]."""
    p = tuner.program
    edges = np.arange(BINS + 1) * p.objective.timesteps // BINS
    one, two, _ = blindness.differing(SEED, fact, COUNT)
    batch = {"image": drawing.draw(one), "other": drawing.draw(two)}

    @jax.jit
    def losses(arrays, batch, keys):
        with p.tracing():
            return p.skeleton.merge(arrays).condition_losses(batch, keys, edges)

    found = losses(arrays, batch, jax.random.split(jax.random.key(SEED), COUNT))
    return np.asarray(((found["other"] - found["own"]) * found["nats_per_loss"]).sum(axis=0), np.float64)


def gradients(tuner: tuning.Tuner, arrays: Arrays) -> list[Arrays]:
    """Gradients of an arm's loss to its vision tower, one for each of `GROUPS` batches of `IMAGES` images."""
    p = tuner.program
    encoder = [n for n in p.active(len(p.stages) - 1) if n.startswith("vision/")]

    @jax.jit
    def gradient(arrays, batch, keys):
        def loss(trained):
            return p.skeleton.merge(arrays, trained).loss(batch, keys)[0]

        with p.tracing():
            return jax.grad(loss)({n: arrays[n] for n in encoder})

    given = tuning.batches(p.config, p.objective.inputs, SEED, GROUPS)
    return [
        gradient(arrays, batch, jax.random.split(jax.random.key(SEED + i), IMAGES)) for i, batch in enumerate(given)
    ]


def noise_scale(found: list[Arrays]) -> float:
    """The gradient noise scale of groups' gradients, in images; infinite where their mean has no power above noise."""
    flat = np.stack([np.concatenate([np.ravel(g[n]) for n in sorted(g)]) for g in found]).astype(np.float64)
    products = flat @ flat.T
    own, n = np.trace(products) / len(flat), len(flat)
    signal = (products.sum() - np.trace(products)) / (n * (n - 1))
    return IMAGES * (own - signal) / signal if signal > 0 else float("inf")


def direction(tuner: tuning.Tuner, arrays: Arrays, step: Arrays, encoder: blindness.Encoder, fact: str) -> np.ndarray:
    """The cosines of the module's text, [COUNT], for a change `step` of the vision tower's parameters."""
    p = tuner.program
    one, two, said = blindness.differing(SEED, fact, COUNT)

    @jax.jit
    def embed(arrays, step, share, images):
        """Unit embeddings after a step of this share of the parameters' norm."""
        size = share * optax.tree.norm({n: arrays[n] for n in step}) / optax.tree.norm(step)
        with p.tracing():
            m = p.skeleton.merge(arrays, {n: arrays[n] + size * s for n, s in step.items()})
            view = preprocess.normalise(preprocess.to_float(images), m.spec.mean, m.spec.std)
            e = m.vision.encode(view).pooled
            return e / jnp.linalg.norm(e, axis=-1, keepdims=True)

    def change(images):
        """A central difference: on CPUs attention has a rule for gradients, and none for forward-mode derivatives."""
        ends = (np.asarray(embed(arrays, step, share, images), np.float64) for share in (_SHARE, -_SHARE))
        return np.subtract(*ends)

    moved = np.subtract(*(change(drawing.draw(s)) for s in (one, two)))
    asked = np.subtract(*(encoder.texts([f"{captions.PREFIX} {t}" for t in texts]) for texts in said))
    lengths = np.linalg.norm(moved, axis=1) * np.linalg.norm(asked, axis=1)
    return (moved * asked).sum(axis=1) / np.maximum(lengths, 1e-30)


def _with_interval(values: np.ndarray) -> list[float]:
    """[mean, low, high]."""
    return [float(values.mean()), *stats.bootstrap(values, resamples=_RESAMPLES, seed=0)]


def measure(name: str, folder: Path, encoder: blindness.Encoder) -> dict:
    """{"nats" (for arms with a condition), "cosine": fact -> [mean, low, high], "noise_scale"} of an arm."""
    tuner = tuning.Tuner(arms.find(name), arms.Budget(GROUPS * IMAGES, IMAGES), folder)
    arrays = tuner.initial(0)
    found = gradients(tuner, arrays)
    step = {n: -sum(g[n] for g in found) / len(found) for n in found[0]}
    out = {
        "cosine": {f: _with_interval(direction(tuner, arrays, step, encoder, f)) for f in scenes.FACTS},
        "noise_scale": noise_scale(found),
    }
    if hasattr(tuner.program.objective, "condition_losses"):
        out["nats"] = {f: _with_interval(information(tuner, arrays, f)) for f in scenes.FACTS}
    return out


def table(rows: Mapping[str, Mapping]) -> str:
    """Markdown: a row for the generator, then one for each arm."""

    def cells(found: Mapping | None, form: str) -> str:
        if not found:
            return " | ".join(["-"] * len(scenes.FACTS))
        return " | ".join(f"{m:{form}} [{a:{form}}, {b:{form}}]" for m, a, b in (found[f] for f in scenes.FACTS))

    head = [f"{what}, {fact}" for what in ("nats", "cosine") for fact in scenes.FACTS]
    lines = [f"| | {' | '.join(head)} | noise scale, images |", "|---" * (len(head) + 2) + "|"]
    for name, r in rows.items():
        scale = f"{r['noise_scale']:.0f}" if "noise_scale" in r else "-"
        lines.append(f"| {name} | {cells(r.get('nats'), '.1f')} | {cells(r.get('cosine'), '.2f')} | {scale} |")
    return "\n".join(lines)


def _main() -> None:
    given = flags.FLAGS
    folder = world.folder(given.out, "runs/world_why")
    if unknown := [n for n in given.arms if not arms.find(n).objective]:
        raise UserError(f"--arms has {listing(unknown)}, which is not tuned: leave it out")
    folder.mkdir(parents=True, exist_ok=True)
    generator, encoder = Generator(), blindness.Encoder()
    rows = {"the generator, in words": {"nats": {f: _with_interval(generator.nats(f, COUNT)) for f in scenes.FACTS}}}
    for name in given.arms:
        say(name)
        rows[name] = measure(name, folder, encoder)
        (folder / "why.json").write_text(json.dumps(rows, indent=1) + "\n")
    say(table(rows))


if __name__ == "__main__":
    flags.DEFINE_list("arms", ["labels", "judge", "diva", "unclip"], "Names of arms, see arms.py.")
    world.run(_main, "Folder for why.json.")
