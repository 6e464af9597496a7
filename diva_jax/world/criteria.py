"""Checks that the small world can show a gain: python -m diva_jax.world.criteria --out=runs/experiment

An arm that gains nothing means something only if these criteria hold: the CLIP knows the objects and is blind to the
absent facts alone; the generator and the teacher know the absent facts; and training with true labels, with the same
text tower and the budget of every arm, raises matches of these in every seed. The runs with labels are those of the
experiment in OUT; missing ones are made. The exit code is 1 where a criterion does not hold.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from absl import flags

from diva_jax import world
from diva_jax.common.errors import RunError
from diva_jax.common.log import say
from diva_jax.world import arms, blindness, comparison, models, scenes
from diva_jax.world.endpoints import ENDPOINTS, NAMES, SEEN
from diva_jax.world.experiment import experiment
from diva_jax.world.knowledge import Generator
from diva_jax.world.tuning import Examiner


class Criterion(NamedTuple):
    """A figure in percent or points, and the range in which it must be."""

    what: str
    value: float
    least: float
    most: float = 100.0

    @property
    def holds(self) -> bool:
        return self.least <= self.value <= self.most


def of_models(weights: Path, tests: blindness.Tests) -> Iterator[Criterion]:
    """The criteria of a CLIP, a teacher and a generator in one folder."""
    for name in (models.CLIP, models.TEACHER):
        found = Examiner(tests, str(weights / name))({})
        if name == models.CLIP:
            yield Criterion("CLIP, names of both objects", ENDPOINTS[NAMES].score(found), 95)
        for fact in scenes.FACTS:
            matches = 100 * float(found[f"matches/{fact}"].mean())
            if name == models.TEACHER:
                yield Criterion(f"teacher, matches of {fact}", matches, 90)
            elif fact in scenes.ABSENT:
                yield Criterion(f"CLIP, matches of {fact}", matches, 45, 60)
            else:
                yield Criterion(f"CLIP, matches of {fact}", matches, 95)
    generator = Generator(str(weights / models.GENERATOR))
    for fact in scenes.ABSENT:
        right = generator.right(fact, len(tests.pairs.images) // len(scenes.FACTS))
        yield Criterion(f"generator as a classifier, {fact}", 100 * float(right.mean()), 90)


def of_labels(rows: list[dict]) -> Iterator[Criterion]:
    """The criteria of the positive control, for each of its runs."""
    compared = comparison.compare(rows)
    before = compared["untuned"].scores
    for seed, (seen, names) in enumerate(zip(*(compared["labels"].each[e] for e in (SEEN, NAMES)), strict=True)):
        yield Criterion(f"labels, seed {seed}: gain in matches of absent facts", seen - before[SEEN], 20)
        yield Criterion(f"labels, seed {seed}: change of names", names - before[NAMES], -2)


def _main() -> None:
    given = flags.FLAGS
    out, found = world.folder(given.out, "runs/experiment"), []

    def show(c: Criterion) -> None:
        found.append(c)
        limits = f"at least {c.least:g}" if c.most == 100 else f"{c.least:g} to {c.most:g}"
        say(f"{'holds' if c.holds else 'FAILS'}  {c.what}: {c.value:.1f} ({limits})")

    for c in of_models(Path(given.weights or models.WEIGHTS), blindness.Tests.make()):
        show(c)
    if not given.weights:
        rows = experiment(out, ["labels"], range(given.seeds), arms.Budget(), blindness.PAIRS)
        for c in of_labels(rows):
            show(c)
    if wrong := [c.what for c in found if not c.holds]:
        raise RunError(f"{len(wrong)} of {len(found)} criteria do not hold: {'; '.join(wrong)}")
    say(f"all {len(found)} criteria hold")


if __name__ == "__main__":
    flags.DEFINE_string("weights", "", "Folder of models in place of the kept ones; the labels are then left out.")
    flags.DEFINE_integer("seeds", 5, "Of the runs with labels.", 1)
    world.run(_main, "Folder of the experiment.")
