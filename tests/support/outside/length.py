"""A task of evaluation from outside of the package: the length of its path, times an option."""

import dataclasses

from ml_collections import ConfigDict

from diva_jax.evals import Outcome, Task

RULES = (("scale", lambda x: x > 0, "must be above 0"),)


@dataclasses.dataclass(frozen=True)
class Options:
    scale: float = 2.0


def default():
    return ConfigDict(dataclasses.asdict(Options()))


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
