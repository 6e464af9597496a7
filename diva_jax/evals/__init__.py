"""Evaluation tasks, each a module of this package found by its name, and what they write.

A task module has `prepare(path, options) -> Task`. It reads and checks the data before any weights are loaded,
and raises a UserError that names the file and row where something is wrong. A new task is a new module with
that one function; `evaluate.py` needs no change.

`DIR/results.json` of `python -m diva_jax.evaluate` (lists and numbers cut here; every path is absolute):

    {
      "schema": 1,
      "created": "2026-01-31T12:00:00+00:00",
      "versions": {"diva_jax": "0.1.0", "python": "3.11.9", "jax": "0.10.2", "flax": ..., "numpy": ..., "pillow": ...},
      "devices": "8 x cpu",
      "config": {...},
      "options": {"batch_size": 64, "seeds": 10, "bootstrap": 10000, "seed": 0, "dtype": "float32"},
      "weights": [
        {"label": "openai", "source": "weights/vitl14", "step": null},
        {"label": "runs/vitl14:4600", "source": "runs/vitl14", "step": 4600}
      ],
      "tasks": {
        "mmvp": {
          "title": "MMVP-VLM",
          "data": "/data/MMVP_VLM",
          "count": 135, "items": "pairs",
          "metrics": {
            "pooled": {"title": "pooled embedding", "unit": "%"},
            "published": {"title": "published readout, cls + mean(random 76), l2", "unit": "%"}
          },
          "weights": {
            "openai": {
              "scores": {
                "pooled": {"score": 19.26, "interval": [13.33, 25.93]},
                "published": {"score": 19.7, "interval": [14.1, 25.6], "seeds": [20.0, 19.26], "seeds_std": 0.5}
              },
              "patterns": [
                {"name": "Orientation and Direction", "count": 15, "scores": {"pooled": {...}, "published": {...}}}
              ]
            },
            "runs/vitl14:4600": {...}
          },
          "comparisons": [
            {
              "before": "openai", "after": "runs/vitl14:4600",
              "scores": {
                "pooled": {
                  "difference": 5.93, "interval": [0.74, 11.11],
                  "mcnemar": {"won": 10, "lost": 2, "p": 0.0386}
                }
              },
              "flipped": [
                {
                  "metric": "pooled", "item": 4, "group": "Orientation and Direction", "won": true,
                  "images": ["/data/MMVP_VLM/MMVP_VLM_Images/.../9.jpg", "/data/.../10.jpg"],
                  "texts": ["a photo of ...", "a photo of ..."],
                  "before": [0.61, 0.55], "after": [0.61, 0.45]
                }
              ]
            }
          ]
        },
        "zeroshot": {... metrics acc1, acc5, mean_per_class_recall ...},
        "retrieval": {... metrics image_retrieval_recall@1, ..., text_retrieval_recall@10 ...},
        "drift": {... metric effective_rank; comparisons' metrics cosine, knn_overlap ...},
        "feedback": {... metrics loss_own, gap_other, gap_text, gradient_cosine, gradient_snr; its weights have
          "timesteps": [{"low": 0, "high": 100, "scores": {"gap_other": {"score": 0.002, "interval": [...]}}}] ...}
      }
    }

`metrics` names every score and every compared figure of a task; `unit` is "%" or "". A comparison has a `difference`
or, where it is itself the score (drift's cosine and knn_overlap), a `score`. `interval` is a 95% interval
or null, `mcnemar` is null where a metric has no right and wrong, `patterns` and `flipped` are there where a task
has them. The first of the weights is `before` in every comparison. In `flipped`, `before` and `after` are what
the softmax gives image 1 under each of the two texts (right: above 0.5 for the first, not for the second). Weights may
have `notes`: sentences for the reader, which `evaluate` prints.

`DIR/predictions.csv` has every single score: the columns `task,weights,metric,seed,item,file,text,truth,predicted,
score,correct`, then those that only some tasks have.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any, Protocol

from diva_jax.common.errors import UserError, listing
from diva_jax.evals import tasks


@dataclasses.dataclass(frozen=True)
class Options:
    """How to evaluate, the same for every task.

    Attributes:
      batch_size: images (and texts) that go through a tower at once, over all devices; any number.
      seeds: draws of random patches for a published readout that has some.
      bootstrap: resamples behind an interval.
      seed: of the draws and the resamples.
      classes, templates: JSON files with class names and prompt templates for `zeroshot`; empty: the data's own.
      neighbours: k of `drift`'s kNN overlap.
      images: at most so many of the images of `feedback`, chosen by the seed; they are kept in memory.
      draws: gradients of `feedback` on the same images.
      dtype: what the towers compute in; "float32" asks for full precision of chips that would use less.
    """

    batch_size: int = 64
    seeds: int = 10
    bootstrap: int = 10_000
    seed: int = 0
    classes: str = ""
    templates: str = ""
    neighbours: int = 10
    images: int = 256
    draws: int = 4
    dtype: str = "float32"

    def __post_init__(self):
        least = dict.fromkeys(("batch_size", "seeds", "bootstrap", "neighbours"), 1) | {"images": 2, "draws": 2}
        for field, minimum in least.items():
            if getattr(self, field) < minimum:
                raise UserError(f"evaluation: {field}={getattr(self, field)} must be at least {minimum}")
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"evaluation: dtype={self.dtype!r} is not known: use float32 or bfloat16")


@dataclasses.dataclass
class Outcome:
    """What a task finds for one set of weights.

    Attributes:
      results: goes into results.json as it is: `scores`, and whatever else the task reports.
      rows: of predictions.csv.
      held: arrays that `Task.compare` needs; never written.
    """

    results: dict[str, Any]
    rows: list[dict[str, Any]]
    held: dict[str, Any]


class Task(Protocol):
    """A task with its data at hand.

    Two more methods are optional. `bind(config, mesh)` is called once, before any weights are loaded; it raises a
    UserError where the task cannot be done with this config. `scalars(outcome)` gives the scores that the train loop
    logs of an outcome, by their full key; a task that has it is not compared with the encoder that a run began with.

    Attributes:
      title: as a reader should see it.
      data: where the data is, absolute.
      count, items: how many of what ("pairs", "images").
      metrics: name -> {"title", "unit"} of everything that `evaluate` and `compare` report.
      texts: every text whose embedding `evaluate` will ask for.
    """

    title: str
    data: str
    count: int
    items: str
    metrics: dict[str, dict[str, str]]
    texts: Sequence[str]

    def evaluate(self, model) -> Outcome:
        """Scores one set of weights, an `encode.Model`."""

    def compare(self, before: Outcome, after: Outcome) -> dict[str, Any]:
        """Two weights on the same data: `scores`, `flipped` where there is something to show, `rows` for the CSV."""


def names() -> list[str]:
    """Every task there is."""
    return sorted(m.name for m in pkgutil.iter_modules(tasks.__path__))


def find(name: str):
    """The module of a task.

    Raises:
      UserError: there is none of this name.
    """
    if name not in names():
        raise UserError(f"--task={name} is not known: use {listing(names())}")
    return importlib.import_module(f"{tasks.__name__}.{name}")
