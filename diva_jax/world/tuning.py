"""Tunes the world's CLIP in one process: one compiled program per arm, run with several seeds."""

import contextlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from diva_jax.common import log
from diva_jax.common.errors import RunError
from diva_jax.data import pipeline
from diva_jax.training import load, sharding
from diva_jax.training.step import Program, Steps, averaged, train_steps
from diva_jax.world import arms, blindness, models
from diva_jax.world.arms import Arm

Towers = Mapping[str, Mapping[str, jax.Array]]  # Tower -> name -> array.


class Tuner:
    """One arm, compiled once per stage; seeds differ in initial weights, data and draws.

    Args:
      arm: not the untuned one.
      steps: optimizer steps of all stages.
      batch_size: U-Net passes per step.
      folder: where a teacher with random weights is written, if the arm needs it.
    """

    def __init__(self, arm: Arm, steps: int, batch_size: int, folder: Path):
        random = folder / f"random_{arm.objective}"
        if arm.teacher == arms.RANDOM and not random.exists():
            if arm.objective == "kuea":
                models.write_new_clip(random, seed=77)
            else:
                models.write_new_diffusion(random, models.DIFFUSION, seed=77)
        self._config = partial(arms.arm_config, arm, steps=steps, batch_size=batch_size, random=random)
        self._arm = arm
        config = self._config(0)
        self.program = Program(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
        self.steps = Steps(self.program)
        self._first: dict[str, jax.Array] | None = None  # What the shared first stage trained.

    def run(self, seed: int) -> tuple[Towers, float]:
        """Trains with one seed; returns (the tuned towers, the mean loss of the last tenth of the steps).

        Raises:
          RunError: the loss is not finite.
        """
        p, begin = self.program, 0
        if self._arm.shared_first_stage:
            begin = p.stages[0].end
            if self._first is None:
                state, _, _ = self._train(0, 0, begin)
                self._first = state["params"]
        state, frozen, losses = self._train(seed, begin, p.stages[-1].end)
        last = float(np.mean([float(x) for x in losses[-max(1, len(losses) // 10) :]]))
        if not np.isfinite(last):
            raise RunError(f"the loss is {last}: the learning rate is too high")
        return p.towers({**frozen, **averaged(state)}), last

    def initial(self, seed: int) -> dict[str, jax.Array]:
        """All weights at step 0; the config of the program is that of the seed afterwards."""
        p = self.program
        p.config = self._config(seed)  # Programs of two seeds differ in nothing else.
        return load.initial_arrays(p, every_source=False)[0]

    def _train(self, seed: int, begin: int, end: int):
        """Makes the steps from `begin`, the start of a stage, to `end`; returns (state, frozen weights, losses)."""
        p, arrays = self.program, self.initial(seed)
        if begin:
            arrays |= jax.tree.map(jnp.copy, self._first)  # A step takes the arrays of its state.
        state, frozen = p.init_state(arrays), {n: arrays[n] for n in p.abstract_frozen()}
        if begin:
            state["step"] = jnp.full_like(state["step"], begin)
            state["opt"] = p.init_opt(p.stage_at(begin), state["params"])
        batches = pipeline.open_batches(p.config.data, p.objective.inputs, seed=seed, global_batch=p.config.batch_size)
        losses = []
        with contextlib.closing(batches), contextlib.closing(log.progress("  tuning", end - begin)) as bar:
            for _, after, values in train_steps(self.steps, state, frozen, batches.__next__, begin, end):
                state = after
                losses.append(values["loss"])
                bar.update()
        return state, frozen, losses


class Judge:
    """All tests of `blindness`, for any towers."""

    def __init__(self, tests: blindness.Tests):
        self.tests, self._encoder = tests, blindness.Encoder()

    def __call__(self, towers: Towers) -> dict[str, np.ndarray]:
        """The results of `blindness.measure`; towers that are not given are those of the kept CLIP."""
        e = self._encoder
        return blindness.measure(
            self.tests,
            lambda x: e.images(x, towers.get("vision")),
            lambda t: e.texts(t, towers.get("text")),
        )

    def drift(self, towers: Towers) -> float:
        """1 minus the mean cosine of the embeddings of test images to those of the kept CLIP."""
        x = self.tests.test_images
        cosines = (self._encoder.images(x) * self._encoder.images(x, towers.get("vision"))).sum(axis=1)
        return float(1 - cosines.mean())
