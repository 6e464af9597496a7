"""Exported folders, loaded by the original libraries; round trips of every architecture; exports that are refused."""

import dataclasses
import re
import runpy

import numpy as np
import open_clip
import pytest
import specs
import timm
from helpers import failed, refused, tensors
from PIL import Image
from places import ROOT
from specs import CLIP_FOLDER as CLIP, EVA02, H14, SIGLIP_FOLDER as SIGLIP
from torch_models import equal, torch_model, torch_tower, transformers_folder, written_by_open_clip

from diva_jax.models import backbones
from diva_jax.models.backbones import eva02
from diva_jax.models.backbones.shared.open_clip_config import from_open_clip, to_open_clip
from diva_jax.weights import formats, names, origins
from diva_jax.weights.export import layouts, publish
from diva_jax.world import models


def clip(tmp_path, spec=CLIP):
    """The source of a CLIP written by open_clip."""
    written_by_open_clip(tmp_path / "in", spec)
    return origins.open_source(str(tmp_path / "in"))


def back(folder, fmt):
    return origins.open_source(str(folder / (layouts.PT_FILE if fmt == "pt" else "")))


def test_vision_tower_alone_has_no_text_to_export(tmp_path):
    layouts.export(clip(tmp_path), CLIP, tmp_path / "tower", "pt")
    refused("text tower.*=pt", layouts.export, back(tmp_path / "tower", "pt"), CLIP, tmp_path / "out", "open_clip")


def test_what_is_read_back_is_compared(tmp_path, monkeypatch):
    """Nothing is exported if one value in the written file differs."""
    write, source = formats.write_safetensors, clip(tmp_path)

    def spoilt(path, content):
        arrays = {n: np.array(t) for n, t in content.items()}
        arrays["ln_final.bias"][3] += 1e-3
        write(path, arrays)

    monkeypatch.setattr(formats, "write_safetensors", spoilt)
    failed("ln_final.bias", layouts.export, source, CLIP, tmp_path / "out", "open_clip")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(("fmt", "name"), [("open_clip", "open_clip"), ("hf", "transformers")])
@pytest.mark.parametrize(("part", "what"), [(0, "an image"), (2, "a text")])
def test_what_the_library_computes_is_compared(tmp_path, monkeypatch, fmt, name, part, what):
    """Nothing is exported if the library computes another embedding with the correct weights."""
    compute = getattr(layouts, f"{name}_embeddings")

    def spoilt(*args):
        found = compute(*args)
        arrays = [a * (1.0002 if i == part else 1) for i, a in enumerate(found if fmt == "open_clip" else found[0])]
        return arrays if fmt == "open_clip" else (arrays, found[1])

    monkeypatch.setattr(layouts, f"{name}_embeddings", spoilt)
    failed(f"computes another embedding of {what}", layouts.export, clip(tmp_path), CLIP, tmp_path / "out", fmt)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_custom_config_of_weights_that_describe_themselves(tmp_path):
    clip(tmp_path, H14)
    source = str(tmp_path / "in")
    module = runpy.run_path(str(ROOT / "configs/custom.py"))
    found = backbones.spec_of(module["get_config"](source))
    assert found == dataclasses.replace(H14, source=source, select="all", readout="pooled")
    for name, model in module["MODELS"].items():
        config = open_clip.get_model_config(name)
        assert backbones.spec_of(module["get_config"](name)) == from_open_clip(config, name=name)
        if not model["vision_cfg"].get("timm_model_name"):
            spec = backbones.spec_of(module["get_config"](f"{name}-quickgelu"))
            assert spec == from_open_clip(config | {"quick_gelu": True}, name=f"{name}-quickgelu")
    for name, spec in module["DINOV2"].items():
        assert backbones.spec_of(module["get_config"](name)) == spec
        found, _ = names.from_transformers(*names.transformers_configs(spec), name)
        assert found == spec
    refused("does not exist", module["get_config"], "nothing/there.pt")


def tiny_eva02(folder, spec):
    """A tiny model, which `known_to_timm` adds to timm and to our table."""
    folder.mkdir()
    formats.write_open_clip(folder, tensors(torch_model(spec)), to_open_clip(spec))


@pytest.fixture
def known_to_timm(monkeypatch):
    fields = {f: getattr(EVA02, f) for f in eva02.CHECKPOINT.timm["eva02_base_patch16_clip_224"]}
    monkeypatch.setitem(eva02.CHECKPOINT.timm, "eva02_tiny_patch6_clip_42", fields)
    create = timm.create_model
    made = lambda name, *a, **kw: torch_tower(EVA02) if "eva02" in name else create(name, *a, **kw)  # noqa: E731
    monkeypatch.setattr(timm, "create_model", made)


# Name -> (what writes it, its spec, formats, what is said of the format that cannot hold it).
NO_DINOV2 = "open_clip has no dinov2 model: use --format=hf or --format=pt"
ROUND_TRIPS = {
    "h14, heads of 80": (written_by_open_clip, H14, ("open_clip", "hf", "pt"), {}),
    "siglip": (transformers_folder, SIGLIP, ("hf",), {"open_clip": "timm's list, which has none of width 48"}),
    # As DCR tunes it. open_clip passes no activation to timm, so that its format cannot hold such a tower.
    "siglip, tanh": (transformers_folder, dataclasses.replace(SIGLIP, activation="gelu_tanh"), ("hf",), {}),
    "siglip2": (transformers_folder, specs.SIGLIP2_FOLDER, ("hf",), {}),
    "metaclip2": (transformers_folder, specs.METACLIP2_FOLDER, ("hf", "open_clip"), {}),
    "eva02": (tiny_eva02, EVA02, ("open_clip", "pt"), {"hf": "has no eva02 model: use --format=open_clip"}),
}
ROUND_TRIPS |= {n: (transformers_folder, s, ("hf", "pt"), {"open_clip": NO_DINOV2}) for n, s in specs.DINOV2S.items()}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_round_trip(tmp_path, capsys, known_to_timm, name):
    """Run through the library, bit-identical, and with the same description; DINOv2's unused mask token is kept."""
    write, spec, formats, unfit = ROUND_TRIPS[name]
    model = write(tmp_path / "in", spec)
    source = origins.open_source(str(tmp_path / "in"))
    tuned = {field: getattr(source.spec, field) for field in ("source", "select", "readout")}
    tanh = spec.activation == "gelu_tanh"  # A folder that is no export is read as open_clip runs it.
    assert tanh or source.spec == dataclasses.replace(spec, **tuned)
    for fmt in formats:
        card = publish.card(source, spec, fmt, "float32")
        layouts.export(source, spec, tmp_path / fmt, fmt, card=card)
        library = {"hf": "transformers", "pt": "timm" if spec.arch == "dinov2" else "open_clip"}.get(fmt, "open_clip")
        assert f"{library}: largest difference" in capsys.readouterr().out
        found = back(tmp_path / fmt, fmt)
        alone = fmt == "pt" and spec.has_text
        equal(found.tensors, {n: t for n, t in source.tensors.items() if not alone or n.startswith("visual.")})
        assert fmt == "pt" or (found.spec.text, found.spec.activation) == (spec.text, spec.activation)
        if fmt == "hf" and write is transformers_folder:
            again, info = type(model).from_pretrained(tmp_path / "hf", output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"]
            if tanh:
                parts = again.config.vision_config, again.config.text_config
                assert {part.hidden_act for part in parts} == {"gelu_pytorch_tanh"}
            equal(tensors(again), tensors(model))
    if spec.arch == "dinov2":
        assert "visual.mask_token" in found.tensors and "open_clip" not in card
    for fmt, says in unfit.items():
        refused(says, layouts.export, source, spec, tmp_path / "b", fmt)
        assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("fmt, dtype", [("open_clip", "float16"), ("hf", "bfloat16"), ("pt", "float16")])
def test_half_precision_and_another_resolution(tmp_path, dtype, fmt):
    layouts.export(clip(tmp_path), dataclasses.replace(CLIP, image_size=42), tmp_path / "out", fmt, dtype=dtype)
    found = back(tmp_path / "out", fmt)
    assert {str(np.dtype(t.dtype)) for t in found.tensors.values()} == {dtype}
    assert fmt == "pt" or found.spec.image_size == 42


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
