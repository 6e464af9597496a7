"""What the world's generator knows of each fact: its denoising error under a true and under a false text."""

from collections.abc import Sequence

import jax
import numpy as np

from diva_jax.models.diffusion import schedule
from diva_jax.training import partition, workdirs
from diva_jax.training.step import Program
from diva_jax.world import blindness, captions, drawing, models, objectives, vocabulary

SEED = 9101
BINS = 10
FROM, DRAWS = 300, 2  # First timestep (at earlier ones the noisy image itself shows the facts), and draws per image.
_BATCH = 128


class Generator:
    """The world's text-conditioned generator, compiled once; `source` is its folder, by default the kept one."""

    def __init__(self, source: str = ""):
        config = models.base_config(objectives.LATENT)
        config.diffusion.source = source or config.diffusion.source
        program = Program(config, partition.make_mesh(config.mesh, jax.devices()[:1]))
        self._arrays, _ = workdirs.initial_arrays(program)
        self._tokenize = vocabulary.remembering(program.objective.inputs["caption"].tokenizer())
        self._schedule = program.objective.diffusion.scheduler
        self.steps = self._schedule.num_train_timesteps

        def errors(arrays, images, ids, timesteps, noise):
            m = program.skeleton.merge(arrays)
            return m.errors(m.latents(images), ids, timesteps, noise)

        self._errors = jax.jit(errors)
        image = np.zeros((1, drawing.SIDE, drawing.SIDE, 3), np.uint8)
        self._shape = jax.eval_shape(lambda a, x: program.skeleton.merge(a).latents(x), self._arrays, image).shape[1:]
        self.nats_per_error = schedule.nats_per_error(self._schedule, int(np.prod(self._shape)))

    def losses(
        self, images: np.ndarray, texts: Sequence[str], low: int, high: int, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The error of each image under its text at a timestep in low .. high - 1, and these timesteps, [N] both.

        Timesteps and noise depend on `seed` and the number of the image alone, so that texts can be compared.
        """
        rng, n = np.random.default_rng((SEED, seed)), len(images)
        pad = -n % _BATCH
        timesteps = rng.integers(low, high, n + pad).astype(np.int32)
        noise = rng.normal(size=(n + pad, *self._shape)).astype(np.float32)
        ids = self._tokenize([*texts, *[texts[0]] * pad])
        images = np.concatenate([images, images[:1].repeat(pad, 0)])
        parts = [
            np.asarray(self._errors(self._arrays, images[i:j], ids[i:j], timesteps[i:j], noise[i:j]), np.float64)
            for i, j in ((i, i + _BATCH) for i in range(0, n + pad, _BATCH))
        ]
        return np.concatenate(parts)[:n], timesteps[:n]

    def right(self, fact: str, count: int, seed: int = SEED) -> np.ndarray:
        """Whether the true one of two texts that differ in a fact has the smaller error, bool [2 count]."""
        one, two, said = blindness.differing(seed, fact, count)
        images = np.concatenate([drawing.draw(one), drawing.draw(two)])
        first, second = ([f"{captions.PREFIX} {t}" for t in texts] for texts in said)

        def error(texts: list[str]) -> np.ndarray:
            return sum(self.losses(images, texts, FROM, self.steps, k)[0] for k in range(DRAWS))

        return error([*first, *second]) < error([*second, *first])

    def nats(self, fact: str, count: int, seed: int = SEED) -> np.ndarray:
        """The log-likelihood ratio of each image under its text and the same with a fact changed, in nats, [count].

        It is that of `schedule.nats_per_error`, over all timesteps: an upper bound of what feedback through this
        generator can teach of the fact.
        """
        one, _, said = blindness.differing(seed, fact, count)
        images, total = drawing.draw(one), np.zeros(count)
        edges = np.arange(BINS + 1) * self.steps // BINS
        for k, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
            (own, timesteps), (other, _) = (self.losses(images, t, low, high, 100 + k) for t in said)
            total += (high - low) * self.nats_per_error[timesteps] * (other - own)
        return total
