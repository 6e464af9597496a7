"""Exported folders, loaded by the original libraries; round trips of every architecture; exports that are refused."""

import dataclasses
import inspect
import json
import re
import runpy

import numpy as np
import open_clip
import pytest
import timm
import torch
from eval_models import equal, torch_model, transformers_folder, written_by_open_clip
from helpers import close, refused, tensors
from PIL import Image
from places import ROOT
from specs import CLIP_FOLDER as CLIP
from specs import DINOV2, DINOV2_REG, DINOV2_SWIGLU, EVA02, H14, METACLIP2_FOLDER, SIGLIP2_FOLDER
from specs import SIGLIP_FOLDER as SIGLIP

from diva_jax.common.errors import RunError, UserError
from diva_jax.models import backbones
from diva_jax.models.backbones import TABLE, eva02
from diva_jax.models.backbones.shared.open_clip_config import from_open_clip, to_open_clip
from diva_jax.weights import clip, origins, readers, writers
from diva_jax.weights.export import layouts, publish
from diva_jax.weights.readers import Tensor, Tensors
from diva_jax.world import models


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
    compute = getattr(layouts, name)

    def spoilt(*args):
        found = compute(*args)
        arrays = [a * (1.0002 if i == part else 1) for i, a in enumerate(found if fmt == "open_clip" else found[0])]
        return arrays if fmt == "open_clip" else (arrays, found[1])

    monkeypatch.setattr(layouts, name, spoilt)
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
        found, _ = clip.from_transformers(*clip.transformers_configs(spec), name)
        assert found == spec
    refused("does not exist", module["get_config"], "nothing/there.pt")


@pytest.mark.parametrize("fmt", ["open_clip", "hf", "pt"])
def test_round_trip_of_a_small_h14_with_heads_of_80(tmp_path, fmt):
    original = written_by_open_clip(H14, tmp_path / "in")
    source = origins.open_source(str(tmp_path / "in"))
    layouts.export(source, H14, tmp_path / "out", fmt)
    back = origins.open_source(str(tmp_path / "out" / (layouts.PT_FILE if fmt == "pt" else ""))).tensors
    equal(back, {n: t for n, t in original.items() if fmt != "pt" or n.startswith("visual.")})


def test_round_trip_of_a_small_siglip(tmp_path, capsys):
    model = transformers_folder(tmp_path / "in", SIGLIP)
    layouts.export(origins.open_source(str(tmp_path / "in")), SIGLIP, tmp_path / "out", "hf")
    assert "transformers: largest difference" in capsys.readouterr().out
    equal(readers.open_file(tmp_path / "out/model.safetensors"), tensors(model))
    with pytest.raises(UserError, match="timm's list, which has none of width 48"):
        layouts.export(origins.open_source(str(tmp_path / "in")), SIGLIP, tmp_path / "b", "open_clip")
    assert not (tmp_path / "b").exists()


def test_siglip_with_the_tanh_gelu_is_what_transformers_runs(tmp_path, capsys):
    """As DCR tunes it. open_clip passes no activation to timm, so that its format cannot hold such a tower."""
    tanh = dataclasses.replace(SIGLIP, activation="gelu_tanh")
    model = transformers_folder(tmp_path / "in", tanh)
    layouts.export(origins.open_source(str(tmp_path / "in")), tanh, tmp_path / "out", "hf")
    assert "transformers: largest difference" in capsys.readouterr().out  # Compared with the tower of this Spec.
    equal(readers.open_file(tmp_path / "out/model.safetensors"), tensors(model))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert {config[f"{part}_config"]["hidden_act"] for part in ("vision", "text")} == {"gelu_pytorch_tanh"}
    assert "act_layer" not in inspect.signature(open_clip.timm_model.TimmModel).parameters
    for name in ("siglip_so400m", "siglip_so400m_384"):
        with pytest.raises(UserError, match="has no option for gelu_tanh: use --format=hf"):
            to_open_clip(dataclasses.replace(TABLE[name], activation="gelu_tanh"))


@pytest.mark.parametrize("fmt", ["hf", "pt"])
@pytest.mark.parametrize("spec", [DINOV2, DINOV2_REG, DINOV2_SWIGLU], ids=["plain", "registers", "swiglu"])
def test_round_trip_of_a_small_dinov2(tmp_path, capsys, spec, fmt):
    """Run through transformers or timm, and bit-identical; the mask token, which is not used, is kept."""
    model = transformers_folder(tmp_path / "in", spec)
    source = origins.open_source(str(tmp_path / "in"))
    layouts.export(source, spec, tmp_path / "out", fmt, card=publish.card(source, spec, fmt, "float32"))
    library = {"hf": "transformers", "pt": "timm"}[fmt]
    assert f"{library}: largest difference" in capsys.readouterr().out
    back = origins.open_source(str(tmp_path / "out" / (layouts.PT_FILE if fmt == "pt" else "")))
    equal(back.tensors, source.tensors)
    assert "visual.mask_token" in back.tensors and "open_clip" not in (tmp_path / "out/README.md").read_text()
    if fmt == "hf":
        again = type(model).from_pretrained(tmp_path / "out").state_dict()
        equal({k: v.numpy() for k, v in again.items()}, tensors(model))
    with pytest.raises(UserError, match="open_clip has no dinov2 model: use --format=hf or --format=pt"):
        layouts.export(source, spec, tmp_path / "b", "open_clip")
    assert not (tmp_path / "b").exists()


def test_round_trip_of_a_small_siglip2_and_metaclip2(tmp_path, capsys):
    """The text towers' own activation and pooling are in both configs."""
    for name, spec in (("siglip2", SIGLIP2_FOLDER), ("metaclip2", METACLIP2_FOLDER)):
        transformers_folder(tmp_path / name, spec)
        source = origins.open_source(str(tmp_path / name))
        assert source.spec == spec
        layouts.export(source, spec, tmp_path / f"{name}-hf", "hf")
        assert "transformers: largest difference" in capsys.readouterr().out
        assert origins.open_source(str(tmp_path / f"{name}-hf")).spec == spec
    layouts.export(source, spec, tmp_path / "open_clip", "open_clip")
    assert origins.open_source(str(tmp_path / "open_clip")).spec.text == spec.text


def test_round_trip_of_a_small_eva02(tmp_path, capsys, monkeypatch):
    """Runs open_clip with a tiny model that is added to timm and to our table."""
    name = "eva02_tiny_patch6_clip_42"

    def tiny(name, pretrained, **kw):
        sizes = dict(img_size=42, patch_size=6, embed_dim=48, depth=2, num_heads=3, mlp_ratio=133.5 / 48)
        options = dict(qkv_fused=False, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True, use_rot_pos_emb=True)
        return timm.models.eva.Eva(**sizes, **options, ref_feat_shape=(16, 16), **kw)

    fields = {f: getattr(EVA02, f) for f in eva02.CHECKPOINT.timm["eva02_base_patch16_clip_224"]}
    monkeypatch.setitem(eva02.CHECKPOINT.timm, name, fields)
    monkeypatch.setattr(timm, "create_model", tiny)

    (tmp_path / "in").mkdir()
    model = torch_model(EVA02)
    writers.write_open_clip(tmp_path / "in", tensors(model), to_open_clip(EVA02))
    source = origins.open_source(str(tmp_path / "in"))
    assert source.spec == dataclasses.replace(EVA02, source=str(tmp_path / "in"))
    for fmt in ("open_clip", "pt"):
        layouts.export(source, EVA02, tmp_path / fmt, fmt)
        assert "open_clip: largest difference" in capsys.readouterr().out
        back = origins.open_source(str(tmp_path / fmt / (layouts.PT_FILE if fmt == "pt" else ""))).tensors
        equal(back, {n: t for n, t in tensors(model).items() if fmt != "pt" or n.startswith("visual.")})
    with pytest.raises(UserError, match="transformers has no eva02 model: use --format=open_clip"):
        layouts.export(source, EVA02, tmp_path / "hf", "hf")


def test_another_resolution_is_exported_as_such(tmp_path):
    transformers_folder(tmp_path / "in")
    spec = dataclasses.replace(CLIP, image_size=42)
    layouts.export(origins.open_source(str(tmp_path / "in")), spec, tmp_path / "out", "open_clip")
    assert origins.open_source(str(tmp_path / "out")).spec.image_size == 42


@pytest.mark.parametrize("fmt, dtype", [("open_clip", "float16"), ("hf", "bfloat16"), ("pt", "float16")])
def test_half_precision(tmp_path, dtype, fmt):
    written_by_open_clip(CLIP, tmp_path / "in")
    source = origins.open_source(str(tmp_path / "in"))
    layouts.export(source, CLIP, tmp_path / "out", fmt, dtype=dtype)
    back = origins.open_source(str(tmp_path / "out" / (layouts.PT_FILE if fmt == "pt" else ""))).tensors
    assert {str(np.dtype(t.dtype)) for t in back.values()} == {dtype}


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
