"""Tunes the world's CLIP in one process: one compiled program per arm, run with several seeds."""

import dataclasses
import io
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from diva_jax.common import log
from diva_jax.common.errors import RunError
from diva_jax.data.inputs import Example, Input
from diva_jax.training import partition, workdirs
from diva_jax.training.step import Program, Steps, averaged, train_steps
from diva_jax.world import arms, blindness, models, records, vocabulary

Towers = Mapping[str, Mapping[str, jax.Array]]  # Tower -> name -> array.


def batches(config, inputs: Mapping, seed: int, count: int) -> Iterator[dict[str, np.ndarray]]:
    """`count` batches of the world's records, in an order that the seed decides.

    The examples are those of the package's pipeline without its decoder, which costs more than a step of these models;
    each record is read once, and kept.
    """
    source = records.open_source(config.data.path.partition("?")[2])
    make, kept, b = {name: _quick(i).open(config.data) for name, i in inputs.items()}, {}, config.batch_size
    order = np.random.default_rng((seed, 1))
    passes = (order.permutation(len(source)) for _ in range(-(-count * b // len(source))))
    wanted = np.concatenate(list(passes))
    for k in range(count):
        rows = wanted[k * b : (k + 1) * b]
        for i in map(int, rows):
            if i not in kept:
                record = source.read(i)
                image = Image.open(io.BytesIO(record.image)).convert("RGB")
                rng = np.random.default_rng((seed, i))
                example = Example(image, record.text, (0, 0, *image.size), rng, texts=record.texts)
                kept[i] = {name: f(example) for name, f in make.items()}
        found = {name: np.stack([kept[int(i)][name] for i in rows]) for name in make}
        yield found | {"row": np.arange(b, dtype=np.int32)}


def _quick(i: Input) -> Input:
    """The same input; its tokenizer, if it has one, keeps the ids of each text."""
    tokenizer = getattr(i, "tokenizer", None)
    return dataclasses.replace(i, tokenizer=lambda: vocabulary.remembering(tokenizer())) if tokenizer else i


def trained(
    steps: Steps, arrays: Mapping[str, jax.Array], *early: int
) -> Iterator[tuple[int, dict[str, jax.Array], float]]:
    """Makes all steps of a program from these initial weights, with the data of its config.

    Yields, at the steps `early` and at the end, (the step, all weights, the mean loss of the last tenth of the steps);
    weights that were trained are their moving average where there is one. A RunError where the loss is not finite.
    """
    p, losses = steps.program, []
    state, frozen, end = p.init_state(arrays), {n: arrays[n] for n in p.abstract_frozen()}, p.stages[-1].end
    source = batches(p.config, p.objective.inputs, p.config.seed, end)
    with log.progress("  training", end) as bar:
        for _, after, values in train_steps(steps, state, frozen, source.__next__, 0, end):
            state = after
            losses.append(values["loss"])
            bar.update()
            if len(losses) in (*early, end):
                last = float(np.mean([float(x) for x in losses[-max(1, len(losses) // 10) :]]))
                if not np.isfinite(last):
                    raise RunError(f"the loss is {last}: the learning rate is too high")
                yield len(losses), {**frozen, **averaged(state)}, last


class Tuner:
    """One arm, compiled once per stage; seeds differ in initial weights, data and draws.

    Args:
      arm: not the untuned one.
      budget: see `arms.arm_config`.
      folder: where a teacher with random weights is written, if the arm needs it.
    """

    def __init__(self, arm: arms.Arm, budget: arms.Budget, folder: Path):
        random = folder / f"random_{arm.objective}"
        self._config = partial(arms.arm_config, arm, budget=budget, random=random)
        config, self._early = self._config(0), budget.early // budget.batch_size
        if arm.teacher == arms.RANDOM and not random.exists():
            if "diffusion" in config:
                models.write_new_diffusion(random, models.DIFFUSION, seed=77)
            else:
                models.write_new_clip(random, seed=77)
        self.program = Program(config, partition.make_mesh(config.mesh, jax.devices()[:1]))
        self.steps = Steps(self.program)

    def run(self, seed: int) -> Iterator[tuple[int, Towers, float]]:
        """Trains with one seed; yields (images seen, tuned towers, loss), see `trained`, early and at the end.

        The images of stages before the last one, in which the encoder is not trained, are not counted.
        """
        begun = self.program.stages[-1].start
        for step, arrays, loss in trained(self.steps, self.initial(seed), begun + self._early):
            yield (step - begun) * self.program.config.batch_size, self.program.towers(arrays), loss

    def initial(self, seed: int) -> dict[str, jax.Array]:
        """All weights at step 0; afterwards the program has the config of this seed."""
        p = self.program
        p.config = self._config(seed)  # Programs of two seeds differ only in their configs.
        return workdirs.initial_arrays(p, every_source=False)[0]


class Examiner:
    """All tests of `blindness`, for any vision tower."""

    def __init__(self, tests: blindness.Tests, source: str = ""):
        self.tests, self._encoder = tests, blindness.Encoder(source)
        self._texts = self._encoder.texts(tests.statements())
        self._before = self._encoder.images(tests.test_images)

    def __call__(self, towers: Towers) -> dict[str, np.ndarray]:
        """The results of `blindness.measure`; a tower that is not given is the source's.

        Only the vision tower is: no arm tunes the texts.
        """
        return blindness.measure(self.tests, lambda x: self._encoder.images(x, towers.get("vision")), self._texts)

    def drift(self, towers: Towers) -> float:
        """1 minus the mean cosine of the embeddings of test images to those of the source."""
        after = self._encoder.images(self.tests.test_images, towers.get("vision"))
        return float(1 - jnp.mean(jnp.sum(self._before * after, axis=1)))
