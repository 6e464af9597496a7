"""Which facts a generator can teach: its loss under an image's own caption, another's, and one with a fact changed.

The nats of a fact are what the generator knows of it, an upper bound of what feedback through the generator can teach:
the log-likelihood ratio of the image under its caption and under the same with the fact changed, see
`schedule.nats_per_error`; no range of timesteps is left out.

    python -m diva_jax.world.gaps --out=runs/world_gaps

A fact whose change does not raise the loss is not in the gradient, whatever is tuned. The command also proposes the
range of timesteps for tuning: from the first bin in which the loss under another image's caption is at least 5%
higher, with an interval above zero, to the end of the schedule.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from diva_jax.common.errors import UserError
from diva_jax.common.log import say
from diva_jax.evals import stats
from diva_jax.models.diffusion import schedule
from diva_jax.training import load, sharding
from diva_jax.training.step import Program
from diva_jax.world import blindness, captions, drawing, models, objectives, scenes

SEED = 9101
BINS = 10
FROM = 300  # The gap of a fact is measured at timesteps from here on; below, the image itself shows the facts.
_BATCH = 64
_MIN_GAP = 0.05  # The first bin that is used has at least this gap, as a share of the loss.
_RESAMPLES = 2000


class Generator:
    """The world's text-conditioned generator, compiled once.

    Args:
      source: its folder, in diffusers' layout.
    """

    def __init__(self, source: str = ""):
        config = models.base_config(objectives.LATENT)
        config.diffusion.source = source or config.diffusion.source
        program = Program(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
        self._arrays, _ = load.initial_arrays(program)
        self._tokenize = program.objective.inputs["caption"].tokenizer()
        self._schedule = program.objective.diffusion.scheduler
        self.steps = self._schedule.num_train_timesteps

        def errors(arrays, images, ids, timesteps, noise):
            m = program.skeleton.merge(arrays)
            return m.errors(m.latents(images), ids, timesteps, noise)

        self._errors = jax.jit(errors)
        self._latents = jax.eval_shape(
            lambda a, x: program.skeleton.merge(a).latents(x), self._arrays, np.zeros((1, 32, 32, 3), np.uint8)
        ).shape[1:]
        self.nats_per_error = schedule.nats_per_error(self._schedule, int(np.prod(self._latents)))

    def losses(
        self, images: np.ndarray, texts: Sequence[str], low: int, high: int, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The loss of each image under its text at a timestep in low .. high - 1, and these timesteps, [N] both.

        Timesteps and noise depend on `seed` and the number of the image alone, so that texts can be compared.
        """
        rng, n = np.random.default_rng((SEED, seed)), len(images)
        pad = -n % _BATCH
        timesteps = rng.integers(low, high, n + pad).astype(np.int32)
        noise = rng.normal(size=(n + pad, *self._latents)).astype(np.float32)
        ids = self._tokenize([*texts, *[texts[0]] * pad])
        images = np.concatenate([images, images[:1].repeat(pad, 0)])
        parts = [
            np.asarray(self._errors(self._arrays, images[i:j], ids[i:j], timesteps[i:j], noise[i:j]), np.float64)
            for i, j in ((i, i + _BATCH) for i in range(0, n + pad, _BATCH))
        ]
        return np.concatenate(parts)[:n], timesteps[:n]


def _relative(own: np.ndarray, other: np.ndarray) -> dict[str, float | list[float]]:
    """The mean difference as a share of the mean loss under the own caption, in percent, and its interval."""
    scale = 100 / own.mean()
    ends = stats.bootstrap(other - own, resamples=_RESAMPLES, seed=0)
    return {
        "loss": float(own.mean()),
        "gap": scale * float((other - own).mean()),
        "interval": [scale * e for e in ends],
    }


def _nats(generator: Generator, images: np.ndarray, texts: Sequence[Sequence[str]], seed: int) -> np.ndarray:
    """The log-likelihood ratio of each image under the first of two texts and under the second, [N], in nats."""
    total, edges = np.zeros(len(images)), np.arange(BINS + 1) * generator.steps // BINS
    for k, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        (own, timesteps), (other, _) = (generator.losses(images, t, low, high, seed + k) for t in texts)
        total += (high - low) * generator.nats_per_error[timesteps] * (other - own)
    return total


def by_timestep(generator: Generator, count: int = 256) -> list[dict]:
    """One row per bin of timesteps: {"low", "high", "loss", "gap" [%], "interval" [%]} to another image's caption."""
    rng = np.random.default_rng((SEED, 1))
    drawn = scenes.sample(rng, count)
    texts = captions.captions(drawn, captions.choose(rng, count, captions.RICH))
    images, others = drawing.draw(drawn), [*texts[1:], texts[0]]
    rows, edges = [], np.arange(BINS + 1) * generator.steps // BINS
    for k, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        own, other = (generator.losses(images, t, low, high, 10 + k)[0] for t in (texts, others))
        rows.append({"low": int(low), "high": int(high)} | _relative(own, other))
    return rows


def by_fact(generator: Generator, count: int = 256) -> dict[str, dict]:
    """Fact -> {"loss", "gap" [%], "interval" [%], "nats", "nats_interval"} to the same caption with that fact changed.

    All facts are named. The gap is that of timesteps from `FROM` on, the nats those of all timesteps.
    """
    by_name = {}
    for k, fact in enumerate(scenes.FACTS):
        rng = np.random.default_rng((SEED, 2, k))
        one = blindness.having(rng, fact, count)
        two = scenes.change(one, fact, rng)
        says = captions.choose(rng, count, dict.fromkeys(captions.RICH, 1.0))
        images = drawing.draw(one)
        texts = [captions.captions(s, says) for s in (one, two)]
        own, other = (generator.losses(images, t, FROM, generator.steps, 100 + k)[0] for t in texts)
        nats = _nats(generator, images, texts, 1000 * (k + 1))
        ends = stats.bootstrap(nats, resamples=_RESAMPLES, seed=0)
        by_name[fact] = _relative(own, other) | {"nats": float(nats.mean()), "nats_interval": [float(e) for e in ends]}
    return by_name


def proposed(rows: Sequence[Mapping]) -> tuple[int, int] | None:
    """The range of timesteps for tuning, see the module; None where no bin has a gap."""
    used = [r["low"] for r in rows if r["gap"] >= 100 * _MIN_GAP and r["interval"][0] > 0]
    return (min(used), rows[-1]["high"]) if used else None


def table(rows: Sequence[Mapping], facts: Mapping[str, Mapping]) -> str:
    """Both measurements as text."""
    lines = ["timesteps    loss   gap to another image's caption [% of the loss], 95% interval"]
    for r in rows:
        low, high = r["interval"]
        lines.append(f"{r['low']:>4}-{r['high'] - 1:<5} {r['loss']:.4f} {r['gap']:7.2f}  {low:.2f} to {high:.2f}")
    lines.append(
        f"fact         loss   gap to the caption with that fact changed, timesteps from {FROM} [%]; nats per image"
    )
    for fact, r in facts.items():
        (low, high), (least, most) = r["interval"], r["nats_interval"]
        gap, nats = f"{r['gap']:6.2f}  {low:.2f} to {high:.2f}", f"{r['nats']:.2f}  {least:.2f} to {most:.2f}"
        lines.append(f"{fact:<12} {r['loss']:.4f} {gap}; {nats}")
    return "\n".join(lines)


def _main() -> None:
    out = flags.FLAGS.out
    if not out:
        raise UserError("--out is missing: give a folder for gaps.json, e.g. --out=runs/world_gaps")
    generator = Generator(flags.FLAGS.source)
    rows, facts = by_timestep(generator), by_fact(generator)
    Path(out).mkdir(parents=True, exist_ok=True)
    chosen = proposed(rows)
    content = {"timesteps": rows, "facts": facts, "proposed": chosen}
    (Path(out) / "gaps.json").write_text(json.dumps(content, indent=1) + "\n")
    say(table(rows, facts))
    say(
        f"proposed timesteps: {chosen[0]} to {chosen[1] - 1}"
        if chosen
        else "no bin has a gap: this generator cannot teach"
    )


if __name__ == "__main__":
    from absl import flags

    from diva_jax.common import cli

    # Here and not above: other modules of this package define --out as well.
    flags.DEFINE_string("out", None, "Folder for gaps.json.")
    flags.DEFINE_string("source", "", "Folder of a generator of the world in place of the kept one.")
    cli.run(_main)
