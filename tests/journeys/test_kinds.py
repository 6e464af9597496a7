"""From each kind of data and each kind of backbone to an export that is evaluated again, with the scores of the run."""

import io
import json
from pathlib import Path

import commands
import pytest
import torch_setup  # noqa: F401
import trees
from eval_data import encoded, patch
from records import write_tfds
from specs import DINOV2, GELU, METACLIP2_FOLDER, QUICK, SIGLIP2_FOLDER, SIGLIP_FOLDER
from torch_models import transformers_folder

from diva_jax.models.backbones.shared.open_clip_config import from_open_clip
from diva_jax.weights import names

COUNT = 16
# The objective of docs/WRITE_AN_OBJECTIVE.md, which trains the tower alone, on any weights that describe themselves.
CONFIG = """
from diva_jax import config
from diva_jax.weights import origins

def get_config(folder):
    c = config.default(origins.open_source(folder, "the folder").described(folder), objective="mine.rotations")
    c.backbone.source, c.steps, c.batch_size, c.dtype, c.log.tensorboard = folder, 1, 8, "float32", False
    c.data.threads, c.eval.bootstrap, c.eval.batch_size, c.eval.drift.neighbours = 1, 20, 16, 3
    return c
"""


def write_data(root) -> dict[str, str]:
    """Writes the same images in every form; kind -> the value of `config.data.path`."""
    images = [encoded(patch(i)) for i in range(COUNT)]
    files, table = {f"folder/{i:02d}.png": image for i, image in enumerate(images)}, "saved/data-00000-of-00001.arrow"
    columns = {"image": [{"bytes": image, "path": None} for image in images]}
    tree = files | {"tars/00000.tar": {f"{i:05d}.png": image for i, image in enumerate(images)}}
    tree |= {"images.csv": {"image": list(files), "caption": ["one"] * COUNT}, "images.parquet": columns}
    tree |= {table: columns, "saved/state.json": {"_data_files": [{"filename": Path(table).name}]}}
    trees.change(root, tree | {"saved/dataset_info.json": {"features": {}}})
    examples = [{"image": io.BytesIO(image)} for image in images]
    write_tfds(root / "tfds", "Patches", "train", lambda kinds: {"image": kinds.Image(shape=(None, None, 3))}, examples)
    paths = {name: str(root / name) for name in ("folder", "tars", "images.csv", "images.parquet", "saved")}
    return paths | {"tfds": f"tfds:patches/train?data_dir={root / 'tfds'}"}


# Kind of data -> (kind of backbone, what writes its folder and its spec, format of the export).
KINDS = {
    "folder": ("vit", (names.write_random_clip, QUICK), "open_clip"),
    "tars": ("siglip", (transformers_folder, SIGLIP_FOLDER), "hf"),
    "images.csv": ("metaclip2", (transformers_folder, METACLIP2_FOLDER), "hf"),
    "images.parquet": ("vit_gelu", (names.write_random_clip, GELU), "pt"),
    "saved": ("dinov2", (transformers_folder, DINOV2), "hf"),
    "tfds": ("siglip2", (transformers_folder, SIGLIP2_FOLDER), "hf"),
}


def lines(backbone, data, images, fmt):
    """The three commands of a kind: (command, arguments)."""
    config, run, out = f"--config=kinds.py:{backbone}", f"runs/{backbone}", f"exports/{backbone}"
    yield "main", [config, f"--workdir={run}", f"--config.data.path={data}"]
    yield "export_torch", [f"--workdir={run}", f"--out={out}", f"--format={fmt}", "--trust_objective"]
    file = "/vision_tower.pth" if fmt == "pt" else ""
    weights = [f"--weights={w}" for w in (backbone, run, out + file)]
    yield "evaluate", [config, *weights, "--task=drift", f"--data={images}", f"--out=results/{backbone}"]


def same(root, backbone) -> dict:
    """Asserts that run and export have the same scores; returns the task's results."""
    task = json.loads((root / f"results/{backbone}/results.json").read_text())["tasks"]["drift"]
    _, run, exported = (weights["scores"] for weights in task["weights"].values())
    assert run == exported and task["count"] == COUNT
    return task


@pytest.fixture(scope="module")
def walked(home):
    """A folder in which every kind was trained, exported and evaluated: three commands each."""
    trees.change(home, {"mine/rotations.py": commands.blocks("docs/WRITE_AN_OBJECTIVE.md")[0][1], "kinds.py": CONFIG})
    data = write_data(home / "data")
    for kind, (backbone, (write, spec), fmt) in KINDS.items():
        write(home / backbone, spec)
        for command, line in lines(backbone, data[kind], home / "data/folder", fmt):
            commands.succeed(command, *line, cwd=home)
    return home


@pytest.mark.parametrize("kind", KINDS)
def test_the_export_has_the_scores_of_the_run(walked, kind):
    of_run, of_export = (c["scores"] for c in same(walked, KINDS[kind][0])["comparisons"][:2])
    assert of_run == of_export and 0.1 < of_run["cosine"]["score"] < 0.9999999


@pytest.mark.slow
def test_eva02_from_a_folder_to_open_clip(walked):
    """At the smallest size that open_clip builds; the export ends with what open_clip computes."""
    import open_clip

    model = open_clip.get_model_config("EVA02-B-16")
    model["text_cfg"] |= {"width": 64, "heads": 2, "layers": 2}
    names.write_random_clip(walked / "eva02", from_open_clip({"model_cfg": model}))
    for command, line in lines("eva02", f"{walked}/data/folder", walked / "data/folder", "open_clip"):
        commands.succeed(command, *line, cwd=walked)
    same(walked, "eva02")
