"""EVA02-CLIP from a folder to an export that open_clip loads, at the smallest size that open_clip builds."""

import json

import commands
import eval_data
import pages
import pytest
import torch_setup  # noqa: F401

from diva_jax import demo
from diva_jax.models.backbones.shared.open_clip_config import from_open_clip

CONFIG = """
from diva_jax import config
from diva_jax.weights import origins

def get_config(folder):
    c = config.default(origins.open_source(folder, "the folder").described(folder), objective="mine.rotations")
    c.backbone.source, c.steps, c.batch_size, c.dtype, c.log.tensorboard = folder, 1, 4, "float32", False
    c.data.threads, c.eval.bootstrap, c.eval.batch_size, c.eval.drift.neighbours = 1, 20, 8, 3
    return c
"""
SNIPPET = """
import json, open_clip, torch
from PIL import Image
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:export")
tokens = open_clip.get_tokenizer("local-dir:export")(["a cat", "two dogs"])
with torch.no_grad():
    image = model.encode_image(preprocess(Image.open("data/0.png"))[None])
    text = model.encode_text(tokens)
print(json.dumps({"image": list(image.shape), "text": list(text.shape), "finite": bool(image.isfinite().all())}))
"""


@pytest.mark.slow
def test_eva02_from_a_folder_to_open_clip(tmp_path):
    import open_clip

    model = open_clip.get_model_config("EVA02-B-16")
    model["text_cfg"] |= {"width": 64, "heads": 2, "layers": 2}
    demo.write_clip(tmp_path / "eva02", from_open_clip({"model_cfg": model}))
    for name, text in (("mine/rotations.py", pages.blocks("docs/WRITE_AN_OBJECTIVE.md")[0][1]), ("kinds.py", CONFIG)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "data").mkdir()
    for i in range(8):
        (tmp_path / f"data/{i}.png").write_bytes(eval_data.encoded(eval_data.patch(i)))
    config = "--config=kinds.py:eva02"
    commands.succeed("main", config, "--workdir=run", "--config.data.path=data", cwd=tmp_path)
    commands.succeed("export_torch", "--workdir=run", "--out=export", "--trust_objective", cwd=tmp_path)
    weights = [f"--weights={w}" for w in ("eva02", "run", "export")]
    commands.succeed("evaluate", config, *weights, "--task=drift", "--data=data", "--out=results", cwd=tmp_path)
    _, run, exported = json.loads((tmp_path / "results/results.json").read_text())["tasks"]["drift"]["weights"].values()
    assert run["scores"] == exported["scores"]
    (tmp_path / "snippet.py").write_text(SNIPPET)
    seen = json.loads(commands.succeed(tmp_path / "snippet.py", cwd=tmp_path).splitlines()[-1])
    assert seen == {"image": [1, 512], "text": [2, 512], "finite": True}
