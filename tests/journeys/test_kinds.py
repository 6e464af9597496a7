"""From several kinds of data and backbones of transformers to an export that has the scores of the run."""

import io
import json
from pathlib import Path

import commands
import pytest
import torch_setup  # noqa: F401
import trees
from eval_data import encoded, patch
from records import write_tfds
from specs import DINOV2, METACLIP2_FOLDER, SIGLIP2_FOLDER, SIGLIP_FOLDER
from torch_models import transformers_folder

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
    """Writes the same images in several forms; kind -> the value of `config.data.path`."""
    images = [encoded(patch(i)) for i in range(COUNT)]
    files, table = {f"folder/{i:02d}.png": image for i, image in enumerate(images)}, "saved/data-00000-of-00001.arrow"
    tree = files | {"images.csv": {"image": list(files), "caption": ["one"] * COUNT}}
    tree |= {table: {"image": [{"bytes": image, "path": None} for image in images]}}
    tree |= {"saved/state.json": {"_data_files": [{"filename": Path(table).name}]}}
    trees.change(root, tree | {"saved/dataset_info.json": {"features": {}}})
    examples = [{"image": io.BytesIO(image)} for image in images]
    write_tfds(root / "tfds", "Patches", "train", lambda kinds: {"image": kinds.Image(shape=(None, None, 3))}, examples)
    paths = {name: str(root / name) for name in ("folder", "images.csv", "saved")}
    return paths | {"tfds": f"tfds:patches/train?data_dir={root / 'tfds'}"}


# Kind of data -> the spec of a folder of transformers. test_tune_and_use.py has CLIP's own tower in every format, and
# test_pages.py has tars.
KINDS = {"folder": SIGLIP_FOLDER, "images.csv": METACLIP2_FOLDER, "saved": DINOV2, "tfds": SIGLIP2_FOLDER}


@pytest.fixture(scope="module")
def walked(home):
    """A folder in which every kind was trained, exported and evaluated: three commands each."""
    trees.change(home, {"mine/rotations.py": commands.blocks("docs/WRITE_AN_OBJECTIVE.md")[0][1], "kinds.py": CONFIG})
    data = write_data(home / "data")
    for kind, spec in KINDS.items():
        folder, config = f"weights/{kind}", f"--config=kinds.py:weights/{kind}"
        run, out = f"runs/{kind}", f"exports/{kind}"
        transformers_folder(home / folder, spec)
        commands.succeed("main", config, f"--workdir={run}", f"--config.data.path={data[kind]}", cwd=home)
        flags = [f"--workdir={run}", f"--out={out}", "--format=hf", "--trust_objective"]
        commands.succeed("export_torch", *flags, cwd=home)
        flags = [f"--weights={name}" for name in (folder, run, out)]
        flags += ["--task=drift", f"--data={home}/data/folder", f"--out=results/{kind}"]
        commands.succeed("evaluate", config, *flags, cwd=home)
    return home


@pytest.mark.parametrize("kind", KINDS)
def test_the_export_has_the_scores_of_the_run(walked, kind):
    task = json.loads((walked / f"results/{kind}/results.json").read_text())["tasks"]["drift"]
    _, run, exported = (weights["scores"] for weights in task["weights"].values())
    assert run == exported and task["count"] == COUNT
    of_run, of_export = (c["scores"] for c in task["comparisons"][:2])
    assert of_run == of_export and 0.1 < of_run["cosine"]["score"] < 0.9999999
