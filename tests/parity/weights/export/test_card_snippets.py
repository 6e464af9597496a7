"""The card of an export without a tokenizer: it says so, and its lines of Python encode an image alone."""

import re

import numpy as np
import pytest
from PIL import Image

from diva_jax.weights.export import publish
from diva_jax.world import models


@pytest.mark.parametrize("fmt", ["open_clip", "hf"])
def test_without_a_tokenizer_no_text_is_encoded(fmt, tmp_path, monkeypatch):
    """The journeys run the lines of whole models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        (tmp_path / name).write_bytes((models.WEIGHTS / models.CLIP / name).read_bytes())
    publish.export(str(tmp_path), tmp_path / "out", fmt, "float32", publish.ExportOptions(), run=False)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save("image.jpg")
    card, scope = (tmp_path / "out" / "README.md").read_text(), {}
    assert "**Note:** the export has no tokenizer" in card
    exec(re.search(r"```python\n(.*?)```", card, re.S)[1], scope)  # noqa: S102
    assert "images" in scope and "texts" not in scope
