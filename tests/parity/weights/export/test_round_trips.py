"""Round trips of every architecture through every format, read again by the library of the format."""

import dataclasses
import inspect
import json

import numpy as np
import open_clip
import pytest
import timm
from clip_folders import transformers_folder
from eval_models import torch_model
from exports import equal, written_by_open_clip
from helpers import tensors
from specs import CLIP_FOLDER as CLIP
from specs import DINOV2, DINOV2_REG, DINOV2_SWIGLU, EVA02, H14, METACLIP2_FOLDER, SIGLIP2_FOLDER
from specs import SIGLIP_FOLDER as SIGLIP

from diva_jax.common.errors import UserError
from diva_jax.models.backbones import TABLE, eva02
from diva_jax.models.backbones.shared.open_clip_config import to_open_clip
from diva_jax.weights import origins, readers, writers
from diva_jax.weights.export import cards, layouts


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
    layouts.export(source, spec, tmp_path / "out", fmt, card=cards.card(source, spec, fmt, "float32"))
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

    fields = {f: getattr(EVA02, f) for f in eva02.TIMM["eva02_base_patch16_clip_224"]}
    monkeypatch.setitem(eva02.TIMM, name, fields)
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
