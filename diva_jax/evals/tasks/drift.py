"""How far tuning has moved an encoder: embeddings before and after, on any folder of images.

Cosine: of each image's embedding before and after. kNN overlap: the share of the k nearest neighbours of an image (by
cosine, without the image itself) that are the same. Effective rank (Roy and Vetterli, 2007): the exponential of the
entropy of the normalised singular values; it falls when an encoder collapses.
"""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from diva_jax.common import paths
from diva_jax.common.errors import UserError
from diva_jax.common.fields import at_least, field
from diva_jax.data import files, labelled
from diva_jax.evals import QUERIES, Outcome, Settings, Task, encode, stats


@dataclasses.dataclass(frozen=True)
class DriftOptions:
    """The section `config.eval.drift`."""

    neighbours: int = field(10, "The overlap is that of this many nearest neighbours.", at_least(1))


def neighbours(x: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k nearest rows of each unit row, [N, k], int; among equals the first."""
    out = []
    for start in range(0, len(x), QUERIES):
        scores = x[start : start + QUERIES] @ x.T
        scores[np.arange(len(scores)), start + np.arange(len(scores))] = -np.inf
        out.append(np.argsort(-scores, axis=1, kind="stable")[:, :k])
    return np.concatenate(out)


def overlap(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The share of each row's neighbours that is in both, [N, k] twice -> [N]."""
    return np.array([len(np.intersect1d(b, a)) for b, a in zip(before, after, strict=True)]) / before.shape[1]


def effective_rank(x: np.ndarray) -> float:
    """Of embeddings [N, D]: from 1, where all point the same way, to min(N, D)."""
    from scipy.special import entr  # Here, because importing it takes a second, which training does not need.

    values = np.linalg.svd(x, compute_uv=False)
    return float(np.exp(entr(values / values.sum()).sum()))


class Drift(Task):
    """The task on `path`, a folder of images with any depth of subfolders."""

    title, items = "Drift", "images"

    def __init__(self, path: str, section: ConfigDict, settings: Settings):
        root, self.settings, self.k = paths.expanded(path), settings, DriftOptions(**section).neighbours
        if not root.is_dir():
            raise UserError(f"--data=drift={path} is not a folder: give one with images in it")
        found = files.one_image_each(files.walk(str(root)), str(root))
        self.count, self.data = len(found), str(root.resolve())
        if self.count <= self.k + 1:
            problem = f"{root} has {self.count} images, too few for {self.k} neighbours of each"
            raise UserError(f"{problem}: give more images, or a smaller --config.eval.drift.neighbours")
        self.images = labelled.image_files(found, [None] * self.count, root, rgb=False)
        self.metrics = {
            "effective_rank": {"title": "effective rank", "unit": ""},
            "cosine": {"title": "cosine to the embedding before", "unit": "", "better": ""},
            "knn_overlap": {"title": f"overlap of the {self.k} nearest neighbours", "unit": "%", "better": ""},
        }

    def evaluate(self, model) -> Outcome:
        """The effective rank; the embeddings are held for `compare`."""
        x = encode.unit(model.images(self.images.read, self.count)["pooled"])
        scores = {"effective_rank": {"score": effective_rank(x), "interval": None}}
        held = {"embeddings": x, "neighbours": neighbours(x, self.k), "label": model.label}
        return Outcome({"scores": scores}, [], held)

    def compare(self, before: Outcome, after: Outcome) -> dict:
        """Mean cosine and overlap with intervals, the change of effective rank, and one row per image and metric."""
        cosine = (before.held["embeddings"] * after.held["embeddings"]).sum(axis=1)
        kept = overlap(before.held["neighbours"], after.held["neighbours"])
        how = dict(resamples=self.settings.bootstrap, seed=self.settings.seed)
        rank = [o.results["scores"]["effective_rank"]["score"] for o in (before, after)]
        scores = {
            "cosine": stats.estimate(cosine, scale=1.0, **how),
            "knn_overlap": stats.estimate(kept, **how),
            "effective_rank": {"difference": rank[1] - rank[0], "interval": None, "mcnemar": None},
        }
        rows = [
            {"weights": after.held["label"], "metric": metric, "item": i, "file": name, "score": float(values[i])}
            for metric, values in (("cosine", cosine), ("knn_overlap", kept))
            for i, name in enumerate(self.images.names)
        ]
        return {"scores": scores, "rows": rows}


SECTION, prepare = DriftOptions, Drift
