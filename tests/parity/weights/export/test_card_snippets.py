"""The lines of Python in an export's card, run as written: an image and a text, equal to ours."""

import re

import numpy as np
import pytest
from helpers import close
from PIL import Image

from diva_jax import api
from diva_jax.weights.export import publish
from diva_jax.world import models


def snippet(folder) -> str:
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]


def run_snippet(folder, monkeypatch) -> dict:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    size = models.SPEC.image_size
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 3), np.uint8)).save("image.jpg")
    scope = {}
    exec(snippet(folder), scope)  # noqa: S102
    return scope


def unit(rows):
    rows = np.asarray(rows)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.mark.parametrize("fmt", ["open_clip", "hf"])
def test_the_worlds_model(fmt, tmp_path, monkeypatch):
    """Its vocabulary is its own, so that the tokenizer's files must be those of the folder."""
    source = str(models.WEIGHTS / models.CLIP)
    publish.export(source, tmp_path / "out", fmt, "float32", publish.ExportOptions(), run=False)
    scope = run_snippet(tmp_path / "out", monkeypatch)
    ours = api.load(source)
    close(unit(scope["images"]), ours.encode_image("image.jpg", normalise=True), 2e-5)
    close(unit(scope["texts"]), ours.encode_text("a photo of a dog", normalise=True), 2e-5)


def test_without_a_tokenizer_no_text_is_encoded(tmp_path, monkeypatch):
    """And the card says so."""
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        (tmp_path / name).write_bytes((models.WEIGHTS / models.CLIP / name).read_bytes())
    for fmt in ("open_clip", "hf"):
        out = tmp_path / fmt / "out"
        publish.export(str(tmp_path), out, fmt, "float32", publish.ExportOptions(), run=False)
        assert "**Note:** the export has no tokenizer" in (out / "README.md").read_text()
        scope = run_snippet(out, monkeypatch)
        assert "images" in scope and "texts" not in scope
