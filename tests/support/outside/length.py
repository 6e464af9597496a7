"""A task of evaluation from outside of the package: the length of its path, times an option."""

import dataclasses

from diva_jax.common.fields import above, field
from diva_jax.evals import Outcome, Task


@dataclasses.dataclass(frozen=True)
class Options:
    scale: float = field(2.0, "The factor.", above(0))


SECTION = Options


class Length(Task):
    title, items, count = "Length", "letters", 1
    metrics = {"length": {"title": "length", "unit": ""}}

    def __init__(self, path, options, settings):
        self.data, self.options, self.settings = path, options, settings

    def evaluate(self, model):
        score = self.options.scale * len(self.data)
        return Outcome({"scores": {"length": {"score": score, "interval": None}}}, [], {"score": score})

    def compare(self, before, after):
        difference = after.held["score"] - before.held["score"]
        return {"scores": {"length": {"difference": difference, "interval": None, "mcnemar": None}}}


def prepare(path, section, settings):
    return Length(path, Options(**section), settings)
