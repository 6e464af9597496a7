"""Small data sets and models for the tests of evaluation; the images are scikit-image's photographs."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import trees
from ml_collections import ConfigDict
from PIL import Image
from records import saved as encoded

from diva_jax import config, evals
from diva_jax.evals.tasks.mmvp import FOLDERS, HEADER, PATTERNS, PER_PATTERN
from diva_jax.models.backbones import Spec

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket", "camera", "logo")

TEXTS, CHOICES = (json.loads(Path(__file__).with_name(f"{name}.json").read_text()) for name in ("texts", "choices"))


def statement(row: int) -> str:
    return f"thing number {row * 7}, seen from {'left' if row % 2 else 'above'}"


def eval_config(spec: Spec, source: Path):
    return config.default(dataclasses.replace(spec, source=str(source)))


@functools.cache
def photograph(name: str) -> Image.Image:
    return Image.fromarray(getattr(skimage.data, name)())


def patch(index: int) -> Image.Image:
    """Returns a piece of a photograph, different for each index; consecutive ones differ in size."""
    rng = np.random.default_rng(index)
    whole = photograph(PHOTOGRAPHS[index % 4])
    w, h = 50 + index % 17, 45 + index % 13
    left, top = rng.integers(0, whole.width - 2 * w), rng.integers(0, whole.height - 2 * h)
    return whole.crop((left, top, left + 2 * w, top + 2 * h)).resize((w, h))


def write_image(path: Path, index: int) -> None:
    """Writes `patch(index)` in the format of the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    patch(index).save(path)


def write_class_folders(root: Path, labels: list[int], folders: list[str]) -> Path:
    """Writes one image per label, `root/<folder of the label>/<number>.png`."""
    for i, label in enumerate(labels):
        write_image(root / folders[label] / f"{i:03d}.png", i)
    return root


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class FakeModel:
    """Random embeddings, by number of the image and by text; those that were asked for stay here."""

    label = "fake"

    def __init__(self, seed: int = 0, dim: int = 6):
        self.dim, self.rng = dim, np.random.default_rng(seed)
        self.pooled, self.published, self.sizes, self.words = [], [], [], {}

    def draw(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal((*shape, self.dim))

    def images(self, read, count, seeds=0):
        self.sizes.append([read(i).size for i in range(count)])
        self.pooled.append(self.draw(count))
        self.published.append(self.draw(count, seeds))
        return {"pooled": self.pooled[-1], "published": self.published[-1]}

    def texts(self, texts):
        for text in dict.fromkeys(texts):
            if text not in self.words:
                self.words[text] = self.draw()
        return np.stack([self.words[t] for t in texts])


def prepared(name: str, path, bootstrap: int = 300, **options) -> evals.Task:
    """Returns a task of the package on its data."""
    section = evals.default().get(name, ConfigDict())
    section.update(options)
    return evals.find(name).prepare(str(path), section, evals.Settings(bootstrap=bootstrap))


def evaluated(task: evals.Task, kind=FakeModel):
    """Evaluates two models, and asserts what holds for every task: the scores' intervals, the differences, the rows.
    Returns:
      (the first model, its outcome, the comparison with the second).
    """
    models = kind(0), kind(1)
    before, after = map(task.evaluate, models)
    assert set(before.results["scores"]) == set(task.metrics)
    for score in before.results["scores"].values():
        assert score["interval"][0] <= score["score"] <= score["interval"][1]
    assert before.rows and all(row["weights"] == "fake" for row in before.rows)
    compared = task.compare(before, after)
    for metric, change in compared["scores"].items():
        want = after.results["scores"][metric]["score"] - before.results["scores"][metric]["score"]
        assert change["difference"] == pytest.approx(want, rel=1e-6, abs=1e-9)
        assert change["interval"][0] <= change["difference"] <= change["interval"][1]
    return models[0], before, compared


def write_mmvp(root: Path, folder: str = FOLDERS[0]) -> Path:
    """Writes 135 pairs of pieces of photographs, each with its own statement."""
    lines = [",".join(HEADER)]
    for row in range(2 * PER_PATTERN * len(PATTERNS)):
        type_ = PATTERNS[row // (2 * PER_PATTERN)].split()[0]
        write_image(root / folder / type_ / f"{row + 1}.jpg", row)
        lines.append(f'{row + 1},{type_},"{statement(row)}"')
    (root / "Questions.csv").write_text("\n".join(lines) + "\n")
    return root


def write_task_data(root: Path) -> dict[str, str]:
    """Writes small data of every task; returns the task's --data."""
    write_mmvp(root / "mmvp")
    write_class_folders(root / "classes", [i % 3 for i in range(12)], ["cup", "logo", "rocket"])
    rows = [(f"classes/cup/{i:03d}.png", f"image {j} of number {i}") for i in range(0, 12, 3) for j in range(1 + i % 2)]
    labels = [np.random.default_rng(i).integers(0, 3, patch(i).size[::-1]).astype(np.uint8) for i in range(2)]
    tree = {"captions.csv": dict(zip(("image", "caption"), zip(*rows, strict=True), strict=True))}
    tree |= {f"voc/SegmentationClass/{i}.png": encoded(Image.fromarray(label)) for i, label in enumerate(labels)}
    tree |= {f"voc/JPEGImages/{i}.jpg": encoded(patch(i), "JPEG") for i in range(2)}
    trees.change(root, tree | {"voc/ImageSets/Segmentation/val.txt": "0\n1\n"})
    write_choices(root / "choice", "add_att")
    write_choices(root / "pairs", "winoground")
    write_class_folders(root / "probe" / "train", [0, 1] * 5 + [1], ["a", "b"])
    write_class_folders(root / "probe" / "test", [0, 1, 1, 0, 0, 0, 1], ["a", "b"])
    write_class_folders(root / "a", [0, 1, 2] * 3, ["n01440764", "n02123045", "n15075141"])
    paths = dict(mmvp="mmvp", zeroshot="classes", retrieval="captions.csv", drift="classes", choice="choice")
    paths |= dict(probe="probe", robustness="a", segmentation="voc", feedback="classes/cup", judge="pairs")
    named = {"robustness": "a=", "segmentation": "voc21="}
    return {task: f"{named.get(task, '')}{root / path}" for task, path in paths.items()}


def write_choices(root: Path, name: str) -> Path:
    """Writes a set of choices.json in its published layout, image k of it `patch(k)`; returns its file."""
    images, file, rows = CHOICES[name].values()
    for index, image in enumerate(images):
        write_image(root / image, index)
    lines = [json.dumps(row) + "\n" for row in rows] if file.endswith("jsonl") else [json.dumps(rows)]
    (root / file).write_text("".join(lines))
    return root / file
