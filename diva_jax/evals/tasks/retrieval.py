"""Image-text retrieval as CLIP_benchmark does it: recall@1, 5 and 10 in both directions. In image retrieval each
caption is a query whose answer is its image; in text retrieval each image is one, answered by any of its captions."""

import numpy as np
from ml_collections import ConfigDict

from diva_jax.common import paths
from diva_jax.common.errors import UserError
from diva_jax.data import labelled
from diva_jax.evals import QUERIES, ItemTask, Settings, Values, encode


def ranks(queries: np.ndarray, answers: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The rank, int [Q] from 0, of the best right answer (bool [Q, A], one or more per row) to each query [Q, D] among
    answers [A, D]; equal scores are ranked in the order of the answers. Scores that are not finite count as wrong: such
    a right answer is ranked last, such a wrong answer first."""
    out = []
    for start in range(0, len(queries), QUERIES):
        scores, mine = queries[start : start + QUERIES] @ answers.T, right[start : start + QUERIES]
        scores = np.where(np.isfinite(scores), scores, np.where(mine, -np.inf, np.inf))
        best = np.where(mine, scores, -np.inf).max(axis=1, keepdims=True)
        equal = scores == best
        ahead = equal & (np.arange(len(answers)) < (equal & mine).argmax(axis=1)[:, None])
        rank = (scores > best).sum(axis=1) + ahead.sum(axis=1)
        out.append(np.where(best[:, 0] == -np.inf, len(answers), rank))
    return np.concatenate(out)


class Retrieval(ItemTask):
    """The task on `path`: tars in CLIP_benchmark's layout (Flickr30k, COCO), or a CSV file with image and caption."""

    title, items = "Retrieval", "images"

    def __init__(self, path: str, section: ConfigDict, settings: Settings):
        where = paths.expanded(path)
        if where.is_file() and where.suffix.lower() == ".csv":
            self.images = labelled.caption_csv(where)
        elif where.is_dir() and labelled.has_tars(where):
            self.images = labelled.tars(where, "txt", str.splitlines)
        else:
            raise UserError(f"--data=retrieval={path} is neither a folder of tar shards nor a CSV file: give one")
        self.settings, self.count, self.data = settings, len(self.images), str(where.resolve())
        self.texts = [caption for captions in self.images.targets for caption in captions]
        if 0 in (counts := [len(captions) for captions in self.images.targets]):
            name = self.images.names[counts.index(0)]
            raise UserError(f"{path}: {name} has no caption: remove the image or give it one")
        # The number of each caption's image.
        self.owner = np.repeat(np.arange(self.count), counts)
        # As in CLIP_benchmark, a metric is named after what is retrieved.
        self.metrics = {
            f"{what}_retrieval_recall@{k}": {"title": f"{what} retrieval, recall@{k}", "unit": "%"}
            for what in ("image", "text")
            for k in (1, 5, 10)
        }

    def values(self, metric: str, held: dict) -> Values:
        """Whether each query succeeds; an image's captions stay together, so for them there is no McNemar test."""
        what, k = metric.split("_")[0], int(metric.split("@")[1])
        clusters = self.owner if what == "image" else None
        return Values(held[what] < k, clusters=clusters, tested=clusters is None)

    def answer(self, model):
        """The rank of the right answer to every query."""
        texts = encode.unit(model.texts(self.texts))
        images = encode.unit(model.images(self.images.read, self.count)["pooled"])
        right = self.owner[:, None] == np.arange(self.count)  # [texts, images]
        held = {"image": ranks(texts, images, right), "text": ranks(images, texts, right.T)}
        return held, self._rows(held), {"texts": len(self.texts)}

    def _rows(self, held: dict) -> list[dict]:
        def row(what: str, item: int, image: int, text: str, rank: int) -> dict:
            query = {"metric": f"{what}_retrieval", "item": item, "file": self.images.names[image], "text": text}
            return query | {"score": int(rank) + 1, "correct": int(rank == 0)}

        by_text = [row("image", i, self.owner[i], text, held["image"][i]) for i, text in enumerate(self.texts)]
        return by_text + [row("text", i, i, "", held["text"][i]) for i in range(self.count)]


prepare = Retrieval
