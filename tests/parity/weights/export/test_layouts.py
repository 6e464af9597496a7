"""Exported folders, loaded by the original libraries, and exports that are refused."""

import dataclasses
import runpy

import numpy as np
import open_clip
import pytest
import torch
from exports import written_by_open_clip
from helpers import close, refused
from PIL import Image
from places import ROOT
from specs import CLIP_FOLDER as CLIP
from specs import H14

from diva_jax.common.errors import RunError
from diva_jax.models import backbones
from diva_jax.models.backbones.shared.open_clip_config import from_open_clip
from diva_jax.weights import hf, origins, writers
from diva_jax.weights.export import layouts, reference
from diva_jax.weights.tensors import Tensor, Tensors


def test_squash_is_in_both_configs(tmp_path):
    """DFN's images are squashed: the transforms of both libraries agree on a wide image."""
    from transformers import AutoImageProcessor

    written_by_open_clip(H14, tmp_path / "in")
    source = origins.open_source(str(tmp_path / "in"))
    for fmt in ("open_clip", "hf"):
        layouts.export(source, H14, tmp_path / fmt, fmt)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (60, 90, 3), np.uint8))
    theirs = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'open_clip'}")[2](image).numpy()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf")
    ours = np.asarray(processor(images=image, return_tensors="np")["pixel_values"][0])
    close(ours, theirs, 0.02)  # Each library resizes in its own way, a crop would be far off.


def test_vision_tower_alone_has_no_text_to_export(tmp_path):
    written_by_open_clip(CLIP, tmp_path / "in")
    layouts.export(origins.open_source(str(tmp_path / "in")), CLIP, tmp_path / "tower", "pt")
    state = torch.load(tmp_path / "tower" / layouts.PT_FILE, weights_only=True)
    assert "conv1.weight" in state and "class_embedding" in state
    tower = origins.open_source(str(tmp_path / "tower" / layouts.PT_FILE))
    refused("only a vision tower", layouts.export, tower, CLIP, tmp_path / "out", "open_clip")


def test_what_is_read_back_is_compared(tmp_path, monkeypatch):
    """Nothing is exported if one value in the written file differs."""
    written_by_open_clip(CLIP, tmp_path / "in")
    write = writers.write_safetensors

    def spoilt(path, content):
        arrays = {n: np.array(t) for n, t in content.items()}
        arrays["ln_final.bias"][3] += 1e-3
        write(path, arrays)

    monkeypatch.setattr(writers, "write_safetensors", spoilt)
    with pytest.raises(RunError, match="ln_final.bias"):
        layouts.export(origins.open_source(str(tmp_path / "in")), CLIP, tmp_path / "out", "open_clip")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("fmt", ["open_clip", "hf"])
@pytest.mark.parametrize(("part", "what"), [(0, "an image"), (2, "a text")])
def test_what_the_library_computes_is_compared(tmp_path, monkeypatch, fmt, part, what):
    """Nothing is exported if the library computes another embedding with the correct weights."""
    written_by_open_clip(CLIP, tmp_path / "in")
    name = {"open_clip": "open_clip_embeddings", "hf": "transformers_embeddings"}[fmt]
    compute = getattr(reference, name)

    def spoilt(*args):
        found = compute(*args)
        arrays = [a * (1.0002 if i == part else 1) for i, a in enumerate(found if fmt == "open_clip" else found[0])]
        return arrays if fmt == "open_clip" else (arrays, found[1])

    monkeypatch.setattr(reference, name, spoilt)
    with pytest.raises(RunError, match=f"computes another embedding of {what}"):
        layouts.export(origins.open_source(str(tmp_path / "in")), CLIP, tmp_path / "out", fmt)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_float16_overflow_is_refused(tmp_path):
    written_by_open_clip(CLIP, tmp_path / "in")
    source = origins.open_source(str(tmp_path / "in"))
    big = Tensor((24,), np.dtype(np.float32), lambda: np.full(24, 1e6, np.float32))
    name = "visual.ln_post.bias"
    big = dataclasses.replace(big, shape=source.tensors[name].shape, read=lambda: np.full(48, 1e6, np.float32))
    source = dataclasses.replace(source, tensors=Tensors(dict(source.tensors) | {name: big}, source.files))
    refused("does not fit float16", layouts.export, source, CLIP, tmp_path / "out", "open_clip", dtype="float16")


def test_custom_config_of_weights_that_describe_themselves(tmp_path):
    written_by_open_clip(H14, tmp_path / "in")
    module = runpy.run_path(str(ROOT / "configs/custom.py"))
    found = backbones.spec_of(module["get_config"](str(tmp_path / "in")))
    assert found == dataclasses.replace(H14, source=str(tmp_path / "in"), select="all", readout="pooled")
    for name, model in module["MODELS"].items():
        config = open_clip.get_model_config(name)
        assert backbones.spec_of(module["get_config"](name)) == from_open_clip(config, name=name)
        if not model["vision_cfg"].get("timm_model_name"):
            spec = backbones.spec_of(module["get_config"](f"{name}-quickgelu"))
            assert spec == from_open_clip(config | {"quick_gelu": True}, name=f"{name}-quickgelu")
    for name, spec in module["DINOV2"].items():
        assert backbones.spec_of(module["get_config"](name)) == spec
        found, _ = hf.from_transformers(hf.to_transformers(spec, "float32"), hf.image_processor(spec), name)
        assert found == spec
    refused("does not exist", module["get_config"], "nothing/there.pt")
