"""From each kind of data and each kind of backbone to an export that is evaluated again, with the scores of the run."""

import io
import json

import commands
import eval_data
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
import torch_setup  # noqa: F401
from records import write_tar, write_tfds
from specs import DINOV2, GELU, METACLIP2_FOLDER, QUICK, SIGLIP2_FOLDER, SIGLIP_FOLDER
from torch_models import transformers_folder

from diva_jax import demo
from diva_jax.models.backbones.shared.open_clip_config import from_open_clip

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


def images() -> list[bytes]:
    return [eval_data.encoded(eval_data.patch(i)) for i in range(COUNT)]


def write_data(root) -> dict[str, str]:
    """Writes the same images in every form; kind -> the value of `config.data.path`."""
    for name in ("folder", "tars", "saved"):
        (root / name).mkdir(parents=True)
    for i, image in enumerate(images()):
        (root / "folder" / f"{i:02d}.png").write_bytes(image)
    write_tar(root / "tars" / "00000.tar", {f"{i:05d}.png": image for i, image in enumerate(images())})
    (root / "images.csv").write_text("\n".join(["image,caption", *(f"folder/{i:02d}.png,one" for i in range(COUNT))]))
    table = pa.table({"image": [{"bytes": image, "path": None} for image in images()]})
    pa.parquet.write_table(table, root / "images.parquet")
    with pa.ipc.new_stream(root / "saved" / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table)
    (root / "saved" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (root / "saved" / "dataset_info.json").write_text(json.dumps({"features": {}}))
    examples = [{"image": io.BytesIO(image)} for image in images()]
    write_tfds(root / "tfds", "Patches", "train", lambda kinds: {"image": kinds.Image(shape=(None, None, 3))}, examples)
    paths = {name: str(root / name) for name in ("folder", "tars", "images.csv", "images.parquet", "saved")}
    return paths | {"tfds": f"tfds:patches/train?data_dir={root / 'tfds'}"}


# Kind of data -> (kind of backbone, what writes its folder and its spec, format of the export).
KINDS = {
    "folder": ("vit", (demo.write_clip, QUICK), "open_clip"),
    "tars": ("siglip", (transformers_folder, SIGLIP_FOLDER), "hf"),
    "images.csv": ("metaclip2", (transformers_folder, METACLIP2_FOLDER), "hf"),
    "images.parquet": ("vit_gelu", (demo.write_clip, GELU), "pt"),
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


def scores(root, backbone) -> list[dict]:
    task = json.loads((root / f"results/{backbone}/results.json").read_text())["tasks"]["drift"]
    return [weights["scores"] for weights in task["weights"].values()]


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """A folder in which every kind was trained, exported and evaluated: three commands each."""
    root = tmp_path_factory.mktemp("kinds")
    (root / "mine").mkdir()
    (root / "mine/rotations.py").write_text(commands.blocks("docs/WRITE_AN_OBJECTIVE.md")[0][1])
    (root / "kinds.py").write_text(CONFIG)
    data = write_data(root / "data")
    for kind, (backbone, (write, spec), fmt) in KINDS.items():
        write(root / backbone, spec)
        for command, line in lines(backbone, data[kind], root / "data/folder", fmt):
            commands.succeed(command, *line, cwd=root)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_the_export_has_the_scores_of_the_run(walked, kind):
    backbone = KINDS[kind][0]
    task = json.loads((walked / f"results/{backbone}/results.json").read_text())["tasks"]["drift"]
    _, run, exported = scores(walked, backbone)
    assert run == exported and task["count"] == COUNT
    of_run, of_export = (c["scores"] for c in task["comparisons"][:2])
    assert of_run == of_export and 0.1 < of_run["cosine"]["score"] < 0.9999999


SNIPPET = """
import json, open_clip, torch
from PIL import Image
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:exports/eva02")
tokens = open_clip.get_tokenizer("local-dir:exports/eva02")(["a cat", "two dogs"])
with torch.no_grad():
    image = model.encode_image(preprocess(Image.open("data/folder/00.png"))[None])
    text = model.encode_text(tokens)
print(json.dumps({"image": list(image.shape), "text": list(text.shape), "finite": bool(image.isfinite().all())}))
"""


@pytest.mark.slow
def test_eva02_from_a_folder_to_open_clip(walked):
    """At the smallest size that open_clip builds."""
    import open_clip

    model = open_clip.get_model_config("EVA02-B-16")
    model["text_cfg"] |= {"width": 64, "heads": 2, "layers": 2}
    demo.write_clip(walked / "eva02", from_open_clip({"model_cfg": model}))
    for command, line in lines("eva02", f"{walked}/data/folder", walked / "data/folder", "open_clip"):
        commands.succeed(command, *line, cwd=walked)
    _, run, exported = scores(walked, "eva02")
    assert run == exported
    (walked / "snippet.py").write_text(SNIPPET)
    seen = json.loads(commands.succeed(walked / "snippet.py", cwd=walked).splitlines()[-1])
    assert seen == {"image": [1, 512], "text": [2, 512], "finite": True}
