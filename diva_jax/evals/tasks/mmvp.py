"""MMVP-VLM (arXiv 2401.06209): 135 pairs of images that CLIP confuses, in nine visual patterns. A pair counts when each
text ("a photo of " + statement) prefers its own image, as published; texts, groups and matches count too
(`evals.stats`). A score is the mean over the patterns."""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from pydantic import Field

from diva_jax.common import json_files, paths
from diva_jax.common.errors import UserError, brief
from diva_jax.common.fields import at_least, field
from diva_jax.data import files, labelled
from diva_jax.evals import LOGIT_SCALE, ItemTask, Outcome, Settings, Values, encode, stats
from diva_jax.models.backbones import spec_of

# A file beside Questions.csv in sets with other patterns: {"patterns": [names], "pairs": pairs of each pattern}.
NAMES = "Patterns.json"
# The folder's names on the hub, in the code of DIVA's authors, and in the benchmark's README.
FOLDERS = ("MLLM_VLM Images", "MLLM_VLM_Images", "MMVP_VLM_Images")
HEADER = ["Question ID", "Type", "Statement"]
OWN = ((0, 0), (1, 1))  # Text 1 belongs to image 1, text 2 to image 2.


@dataclasses.dataclass(frozen=True)
class MmvpOptions:
    """The section `config.eval.mmvp`."""

    seeds: int = field(10, "A published readout of random patches is averaged over this many draws.", at_least(1))


class Question(NamedTuple):
    """One row of Questions.csv; `line` is its line in the file."""

    line: int
    id: int
    image: Path
    text: str


def _root(path: str) -> tuple[Path, Path]:
    """(Questions.csv, the folder of images) of a data path."""
    root = paths.expanded(path)
    if root.name in (*FOLDERS, "Questions.csv"):
        root = root.parent
    questions = root / "Questions.csv"
    if not questions.is_file():
        raise UserError(f"{questions} does not exist: give --data=mmvp=FOLDER, one with Questions.csv and its images")
    folder = next((root / f for f in FOLDERS if (root / f).is_dir()), None)
    if folder is None:
        raise UserError(f"{root} has none of the folders {', '.join(map(repr, FOLDERS))}: put the images there")
    return questions, folder


class _Patterns(json_files.Record):
    """The content of Patterns.json."""

    patterns: Annotated[list[str], Field(min_length=1)]
    pairs: Annotated[int, Field(ge=1)]


_OWN = _Patterns.model_validate_json(Path(__file__).with_name("mmvp.json").read_text("utf-8"))
PATTERNS, PER_PATTERN = _OWN.patterns, _OWN.pairs


def read_patterns(path: str) -> tuple[tuple[str, ...], int]:
    """(names of the patterns, pairs of each): MMVP-VLM's, or what `Patterns.json` beside Questions.csv says."""
    file = _root(path)[0].with_name(NAMES)
    repair = 'it must read {"patterns": [names], "pairs": pairs of each pattern}; remove it if this is MMVP-VLM'
    found = json_files.read(file, _Patterns, repair, _OWN)
    return tuple(found.patterns), found.pairs


def _question(path: Path, folder: Path, line: int, row: dict[str, str]) -> Question:
    where, fields = f"{path}, line {line}", [row[name].strip() for name in HEADER]
    id_, type_, statement = fields
    if not all(fields):
        raise UserError(f"{where}: a row has {', '.join(HEADER)}, none empty, but this one is {brief(fields)}")
    if not (id_.isascii() and id_.isdigit() and len(id_) <= 9) or "/" in type_ or type_ in (".", ".."):
        wrong = f"the Question ID {brief(id_)} is not a number, or the Type {brief(type_)} is not the name of a folder"
        raise UserError(f"{where}: {wrong}")
    image = folder / type_ / f"{int(id_)}.jpg"
    if not os.path.isfile(image):
        raise UserError(f"{where}: its image {brief(str(image), 300)} does not exist: fetch it, or correct the row")
    return Question(line, int(id_), image, f"a photo of {statement}")


def read_questions(path: str) -> list[Question]:
    """The questions, 270 of MMVP-VLM, checked; pattern and pair follow from the position. A UserError names the line or
    file that is missing, broken or out of order."""
    file, folder = _root(path)
    rows = [(line, row) for line, row in files.csv_records(str(file), HEADER) if any(row.values())]
    names, pairs = read_patterns(path)
    if len(rows) != (expected := 2 * pairs * len(names)):
        advice = f"fetch the file again, or say in {NAMES} beside it how many pairs of each pattern there are"
        raise UserError(f"{file} has {len(rows)} questions, {expected} are wanted: {advice}")
    questions, seen = [_question(file, folder, line, row) for line, row in rows], {}
    for first, second in zip(questions[::2], questions[1::2], strict=True):
        if first.id % 2 != 1 or second.id != first.id + 1 or first.image.parent != second.image.parent:
            given = " and ".join(f"{q.id} ({q.image.parent.name})" for q in (first, second))
            rule = f"a pair is an odd Question ID and the next even one of the same Type, not {given}"
            raise UserError(f"{file}, lines {first.line} and {second.line}: {rule}: correct the rows")
        if (line := seen.setdefault(first.image, first.line)) != first.line:
            raise UserError(f"{file}, line {first.line}: question {first.id} appears twice, first in line {line}")
    return questions


def pair_scores(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """The product of each image with each text of its pair, [N, image, text], float64. Images [2N, D] are as the
    readout leaves them, rows 2n and 2n+1 a pair; texts [2N, D] have any length."""
    pairs = np.asarray(images, np.float64).reshape(-1, 2, images.shape[-1])
    return np.einsum("nid,ntd->nit", pairs, encode.unit(texts).reshape(pairs.shape))


class Mmvp(ItemTask):
    """The task on `path`, the folder with Questions.csv and the images; everything there is checked first."""

    title, items = "MMVP-VLM", "pairs"

    def __init__(self, path: str, section: ConfigDict, settings: Settings):
        self.options, self.settings, self.questions = MmvpOptions(**section), settings, read_questions(path)
        shown = [q.image for q in self.questions]
        self.images = labelled.image_files(shown, [None] * len(shown), shown[0].parent.parent, rgb=False)
        # A broken image is found before anything is loaded or scored.
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.images.read, range(len(shown))))
        self.data = str(_root(path)[0].parent.resolve())
        self.patterns, self.per_pattern = read_patterns(path)
        self.count = len(self.questions) // 2
        self.texts = [q.text for q in self.questions]
        self.strata = np.arange(self.count) // self.per_pattern
        self.metrics = stats.pair_metrics("pooled", readout="pooled embedding")
        self.metrics |= stats.pair_metrics("published", readout="published readout")

    def bind(self, config: ConfigDict, mesh) -> None:
        """Names the published readout of the config's backbone."""
        self.metrics |= stats.pair_metrics("published", readout=f"published readout, {spec_of(config).readout}")

    def score(self, metric: str, held: dict, pattern: int | None = None) -> dict:
        """As `ItemTask`, of all pairs or of those of a pattern; with several draws there is the score of each too."""
        right, strata = self._right(metric, held), self.strata
        if pattern is not None:
            right, strata = right[:, strata == pattern], None
        out = stats.estimate(right.mean(axis=0), **Values(right, strata=strata).resampling(self.settings))
        if len(right) > 1:
            seeds = [100 * stats.mean(r, strata) for r in right.astype(float)]
            out |= {"seeds": seeds, "seeds_std": float(np.std(seeds, ddof=1))}
        return out

    def _right(self, metric: str, held: dict) -> np.ndarray:
        """Which pairs a metric has right under each draw, [K, N]."""
        return held[metric.partition("_")[0]][self.metrics[metric]["answers"]]

    def values(self, metric: str, held: dict) -> Values:
        """The share of the draws under which each pair is right."""
        return Values(self._right(metric, held).mean(axis=0), strata=self.strata)

    def answer(self, model):
        """Both readouts: which pairs are right, per pattern too, and every single probability."""
        images = model.images(self.images.read, len(self.questions), seeds=self.options.seeds)
        texts = model.texts(self.texts)
        embeddings = {"pooled": encode.unit(images["pooled"])[:, None], "published": images["published"]}
        held, rows = {}, []
        for readout, e in embeddings.items():
            scores = np.stack([pair_scores(e[:, k], texts) for k in range(e.shape[1])])  # [K, N, image, text]
            right = stats.answers(scores, OWN)
            # What the softmax of the logits over a pair's images gives to image 1, for each text, [K, 2N].
            with np.errstate(over="ignore"):  # A large difference overflows to the right answer, 0.
                first = (1 / (1 + np.exp(LOGIT_SCALE * np.diff(scores, axis=-2)))).reshape(len(scores), -1)
            held[readout] = right | {"first": first.mean(axis=0)}
            for k, table in enumerate(scores):
                rows += self._rows(readout, k, table, first[k], {kind: found[k] for kind, found in right.items()})
        patterns = []
        for i, name in enumerate(self.patterns):
            scores = {metric: self.score(metric, held, i) for metric in self.metrics}
            patterns.append({"name": name, "count": self.per_pattern, "scores": scores})
        return held, rows, {"patterns": patterns}

    def _rows(self, readout: str, seed: int, scores: np.ndarray, first: np.ndarray, right: dict) -> list[dict]:
        """A row for each text; `predicted` is the number of the image it prefers, 0 where it prefers none."""
        first_less_second = -np.diff(stats.rounded(scores), axis=-2).ravel()
        predicted = np.where(first_less_second > 0, 1, np.where(first_less_second < 0, 2, 0))
        rows = []
        for i, q in enumerate(self.questions):
            pair, text, truth = i // 2, i % 2, 2 - q.id % 2
            logits = {f"logit_image_{n + 1}": float(LOGIT_SCALE * scores[pair, n, text]) for n in (0, 1)}
            row = {"metric": readout, "seed": seed, "item": q.id, "file": self.images.names[i], "text": q.text}
            row |= {"truth": truth, "predicted": int(predicted[i]), "correct": int(predicted[i] == truth)}
            row |= {"score": float(first[i]), "pair": pair, "pattern": self.patterns[pair // self.per_pattern]}
            rows.append(row | logits | {f"{kind}_right": int(found[pair]) for kind, found in right.items()})
        return rows

    def compare(self, before: Outcome, after: Outcome) -> dict:
        """As `ItemTask`, and what flipped among pairs and matches. With a readout that draws patches, McNemar's test
        and the flips count a pair as right where more than half of the draws are."""
        flipped = []
        for metric in (m for m, info in self.metrics.items() if info["answers"] in ("image", "match")):
            was, now = (self.values(metric, outcome.held).values > 0.5 for outcome in (before, after))
            first = [outcome.held[metric.partition("_")[0]]["first"] for outcome in (before, after)]
            for n in np.flatnonzero(was != now):
                pair = slice(2 * n, 2 * n + 2)
                flip = {"metric": metric, "item": int(n), "group": self.patterns[n // self.per_pattern]}
                flip |= {"won": bool(now[n]), "texts": [q.text for q in self.questions[pair]]}
                flip |= {"images": [str(q.image.resolve()) for q in self.questions[pair]]}
                flipped.append(flip | {"before": first[0][pair].tolist(), "after": first[1][pair].tolist()})
        return super().compare(before, after) | {"flipped": flipped}


SECTION, prepare = MmvpOptions, Mmvp
