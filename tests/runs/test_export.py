"""Exports: from a checkpoint and from any source, in every layout, read again by the library that it is for."""

import dataclasses
import json
import runpy
import subprocess
import sys

import jax
import numpy as np
import open_clip
import pytest
import timm
import torch
from clip_folders import CLIP, SIGLIP, clip_folder, dinov2_folder, metaclip2_folder, siglip_folder
from eval_models import torch_model
from helpers import randomise, relative_error, tensors
from ml_collections import ConfigDict
from PIL import Image
from places import ROOT
from specs import DINOV2, DINOV2_REG, DINOV2_SWIGLU, EVA02, METACLIP2_FOLDER, SIGLIP2_FOLDER

from diva_jax import config as configs
from diva_jax import demo, weights
from diva_jax.common.errors import RunError, UserError
from diva_jax.export import cards, layouts, reference, runs
from diva_jax.models import backbones, layers
from diva_jax.models.backbones import TABLE, TINY, eva02
from diva_jax.models.backbones.shared.open_clip_config import from_open_clip, to_open_clip
from diva_jax.training import checkpoint, partition, workdirs
from diva_jax.training.sharding import make_mesh, parameter_shardings
from diva_jax.weights import hf, names, origins, readers, writers
from diva_jax.weights.tensors import Tensor, Tensors


def equal(ours, theirs):
    """Two mappings hold the same tensors, bit for bit."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(np.asarray(ours[name]), np.asarray(theirs[name]), err_msg=name)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir whose one checkpoint trained the blocks and the projection, but not the position embeddings."""
    root = tmp_path_factory.mktemp("run")
    demo.write_clip(root / "clip", TINY)
    (root / "clip/tokenizer.json").write_text("{}")
    c = configs.default(TINY, "tiny")
    c.backbone.source, c.data.path, c.data.image_size = str(root / "clip"), "somewhere/photos", 64
    workdir = root / "work"
    workdirs.write_config(workdir, c)
    rng = np.random.default_rng(0)
    tower = names.flat(layers.abstract(lambda rngs: backbones.build(TINY, rngs=rngs)))
    shapes = {"vision/" + partition.name_of(p): v.shape for p, v in tower.items() if p != ("pos_embed",)}
    params = {n: rng.standard_normal(s, np.float32) * 0.05 for n, s in shapes.items()}
    # As a run on a mesh leaves them: pieces on all eight devices.
    mesh = make_mesh(ConfigDict(dict(data=1, fsdp=8)))
    shardings = parameter_shardings(params, mesh, 1)
    placed = {n: jax.device_put(a, shardings[n]) for n, a in params.items()}
    source = origins.open_clip_source(str(root / "clip"))
    meta = {"sources": {"vision": {"source": ["x"], "sha256": readers.fingerprint(source.files)}}}
    checkpoints = checkpoint.Checkpoints(workdir)
    checkpoints.save(7, {"params": placed, "opt": {"mu": placed}, "step": jax.numpy.int32(7)}, {}, meta)
    checkpoints.close()
    return root, params


def test_checkpoint_to_open_clip(run, tmp_path, capsys):
    root, params = run
    source, provenance = runs.run_source(root / "work")
    assert provenance["step"] == 7 and source.spec == dataclasses.replace(TINY, source=str(root / "clip"))
    layouts.export(source, source.spec, tmp_path / "out", "open_clip")
    assert "open_clip: largest difference" in capsys.readouterr().out

    original = origins.open_clip_source(str(root / "clip")).tensors
    written = readers.open_file(tmp_path / "out/open_clip_model.safetensors")
    untouched = [n for n in original if not n.startswith("visual.")] + ["visual.positional_embedding"]
    equal({n: written[n] for n in untouched}, {n: original[n] for n in untouched})
    np.testing.assert_array_equal(
        written["visual.transformer.resblocks.1.mlp.c_fc.weight"], params["vision/blocks/1/mlp/fc1/kernel"].T
    )
    config = json.loads((tmp_path / "out/open_clip_config.json").read_text())
    assert config["model_cfg"]["quick_gelu"] is True and config["preprocess_cfg"]["resize_mode"] == "shortest"
    assert (tmp_path / "out/tokenizer.json").exists()

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    image = preprocess(Image.fromarray(np.random.default_rng(1).integers(0, 255, (90, 70, 3), np.uint8)))[None]
    with torch.no_grad():
        theirs = model.encode_image(image, normalize=True).numpy()
    ours = weights.load(str(tmp_path / "out"), source.spec).encode(image.numpy().transpose(0, 2, 3, 1)).pooled
    ours = ours / np.linalg.norm(ours, axis=-1, keepdims=True)
    assert np.abs(ours - theirs).max() < 1e-5

    again, _ = runs.run_source(root / "work", 7)
    equal(again.tensors, origins.open_clip_source(str(tmp_path / "out")).tensors)


def command(*args):
    args = [sys.executable, "-m", "diva_jax.export_torch", *map(str, args)]
    return subprocess.run(args, capture_output=True, text=True, timeout=300)


def test_command_writes_a_card_and_refuses_to_overwrite(run, tmp_path):
    root, _ = run
    out = tmp_path / "out"
    done = command(f"--workdir={root / 'work'}", f"--out={out}", "--format=hf", "--step=7")
    assert done.returncode == 0, done.stderr
    assert "bit for bit" in done.stdout and "transformers: largest difference" in done.stdout
    card = (out / "README.md").read_text()
    for part in ("step 7", "somewhere/photos", "sha256", "jax ", '"batch_size": 640'):
        assert part in card, part
    refused = command(f"--workdir={root / 'work'}", f"--out={out}")
    assert refused.returncode == 2 and "exists already" in refused.stderr and "Traceback" not in refused.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_bad_workdirs(run, tmp_path):
    root, _ = run
    with pytest.raises(UserError, match="holds no run"):
        runs.run_source(tmp_path)
    with pytest.raises(UserError, match=r"--step=3 has no checkpoint in .*: use one of 7"):
        runs.run_source(root / "work", 3)
    (tmp_path / "config.json").write_text((root / "work/config.json").read_text())
    with pytest.raises(UserError, match="has no checkpoint yet"):
        runs.run_source(tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_a_source_that_changed_is_refused(run, tmp_path):
    root, _ = run
    file = root / "clip/open_clip_model.safetensors"
    before = file.read_bytes()
    demo.write_clip(root / "clip", TINY, seed=5)
    try:
        with pytest.raises(UserError, match="is not the checkpoint that the run began with"):
            runs.run_source(root / "work")
    finally:
        file.write_bytes(before)


H14 = dataclasses.replace(
    TABLE["dfn_h14_378"],
    open_clip_name="",
    image_size=42,
    width=160,
    heads=2,
    layers=2,
    mlp_dim=640,
    embed_dim=24,
    text=CLIP.text,
)


def written_by_open_clip(spec, folder):
    folder.mkdir()
    model = randomise(open_clip.CLIP(**to_open_clip(spec)["model_cfg"]))
    reference.save_open_clip(model, spec, folder)
    return tensors(model)


@pytest.mark.parametrize("fmt", ["open_clip", "hf", "pt"])
def test_round_trip_of_a_small_h14_with_heads_of_80(tmp_path, fmt):
    original = written_by_open_clip(H14, tmp_path / "in")
    source = origins.open_clip_source(str(tmp_path / "in"))
    layouts.export(source, H14, tmp_path / "out", fmt)
    back = origins.open_clip_source(str(tmp_path / "out" / (layouts.PT_FILE if fmt == "pt" else ""))).tensors
    equal(back, {n: t for n, t in original.items() if fmt != "pt" or n.startswith("visual.")})


def test_squash_is_in_both_configs(tmp_path):
    """DFN's images are squashed: the transforms of both libraries agree on a wide image."""
    from transformers import AutoImageProcessor

    written_by_open_clip(H14, tmp_path / "in")
    source = origins.open_clip_source(str(tmp_path / "in"))
    for fmt in ("open_clip", "hf"):
        layouts.export(source, H14, tmp_path / fmt, fmt)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (60, 90, 3), np.uint8))
    theirs = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'open_clip'}")[2](image).numpy()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf")
    ours = np.asarray(processor(images=image, return_tensors="np")["pixel_values"][0])
    assert relative_error(ours, theirs) < 0.02  # Each library resizes in its own way, a crop would be far off.


def test_transformers_vision_model_has_no_missing_key(tmp_path):
    """What LLaVA does with --vision_tower: the vision model alone, out of the whole model's folder."""
    from transformers import CLIPVisionModel

    written_by_open_clip(CLIP, tmp_path / "in")
    layouts.export(origins.open_clip_source(str(tmp_path / "in")), CLIP, tmp_path / "out", "hf")
    model, info = CLIPVisionModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info.get("mismatched_keys")
    assert model.config.hidden_act == "quick_gelu"
    images = np.random.default_rng(0).standard_normal((2, 30, 30, 3), np.float32)
    with torch.no_grad():
        out = model.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).pooler_output
    tower = weights.load(str(tmp_path / "out"), CLIP)
    assert relative_error(tower.encode(images).pooled, out.numpy() @ np.asarray(tower.proj[...])) < 2e-5


def test_round_trip_of_a_small_siglip(tmp_path, capsys):
    model = siglip_folder(tmp_path / "in")
    layouts.export(origins.open_clip_source(str(tmp_path / "in")), SIGLIP, tmp_path / "out", "hf")
    assert "transformers: largest difference" in capsys.readouterr().out
    equal(readers.open_file(tmp_path / "out/model.safetensors"), tensors(model))
    with pytest.raises(UserError, match="timm's list, which has none of width 48"):
        layouts.export(origins.open_clip_source(str(tmp_path / "in")), SIGLIP, tmp_path / "b", "open_clip")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("fmt", ["hf", "pt"])
@pytest.mark.parametrize("spec", [DINOV2, DINOV2_REG, DINOV2_SWIGLU], ids=["plain", "registers", "swiglu"])
def test_round_trip_of_a_small_dinov2(tmp_path, capsys, spec, fmt):
    """Run through transformers, or timm, and bit for bit; the mask token, of no use here, is kept."""
    model = dinov2_folder(tmp_path / "in", spec)
    source = origins.open_clip_source(str(tmp_path / "in"))
    layouts.export(source, spec, tmp_path / "out", fmt, card=cards.card(source, spec, fmt, "float32", None))
    library = {"hf": "transformers", "pt": "timm"}[fmt]
    assert f"{library}: largest difference" in capsys.readouterr().out
    back = origins.open_clip_source(str(tmp_path / "out" / (layouts.PT_FILE if fmt == "pt" else "")))
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
    for name, write, spec in (
        ("siglip2", siglip_folder, SIGLIP2_FOLDER),
        ("metaclip2", metaclip2_folder, METACLIP2_FOLDER),
    ):
        write(tmp_path / name, spec)
        source = origins.open_clip_source(str(tmp_path / name))
        assert source.spec == spec
        layouts.export(source, spec, tmp_path / f"{name}-hf", "hf")
        assert "transformers: largest difference" in capsys.readouterr().out
        assert origins.open_clip_source(str(tmp_path / f"{name}-hf")).spec == spec
    layouts.export(source, spec, tmp_path / "open_clip", "open_clip")
    assert origins.open_clip_source(str(tmp_path / "open_clip")).spec.text == spec.text


def test_round_trip_of_a_small_eva02(tmp_path, capsys, monkeypatch):
    """Through open_clip itself, by a tiny model that timm and our table are given."""
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
    source = origins.open_clip_source(str(tmp_path / "in"))
    assert source.spec == dataclasses.replace(EVA02, source=str(tmp_path / "in"))
    for fmt in ("open_clip", "pt"):
        layouts.export(source, EVA02, tmp_path / fmt, fmt)
        assert "open_clip: largest difference" in capsys.readouterr().out
        back = origins.open_clip_source(str(tmp_path / fmt / (layouts.PT_FILE if fmt == "pt" else ""))).tensors
        equal(back, {n: t for n, t in tensors(model).items() if fmt != "pt" or n.startswith("visual.")})
    with pytest.raises(UserError, match="transformers has no eva02 model: use --format=open_clip"):
        layouts.export(source, EVA02, tmp_path / "hf", "hf")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("fmt", ["open_clip", "hf", "pt"])
def test_half_precision(tmp_path, dtype, fmt):
    written_by_open_clip(CLIP, tmp_path / "in")
    source = origins.open_clip_source(str(tmp_path / "in"))
    layouts.export(source, CLIP, tmp_path / "out", fmt, dtype=dtype)
    back = origins.open_clip_source(str(tmp_path / "out" / (layouts.PT_FILE if fmt == "pt" else ""))).tensors
    assert {str(np.dtype(t.dtype)) for t in back.values()} == {dtype}


def test_vision_tower_alone_has_no_text_to_export(tmp_path):
    written_by_open_clip(CLIP, tmp_path / "in")
    layouts.export(origins.open_clip_source(str(tmp_path / "in")), CLIP, tmp_path / "tower", "pt")
    state = torch.load(tmp_path / "tower" / layouts.PT_FILE, weights_only=True)
    assert "conv1.weight" in state and "class_embedding" in state
    tower = origins.open_clip_source(str(tmp_path / "tower" / layouts.PT_FILE))
    with pytest.raises(UserError, match="vision tower alone"):
        layouts.export(tower, CLIP, tmp_path / "out", "open_clip")


def test_another_resolution_is_exported_as_such(tmp_path):
    clip_folder(tmp_path / "in")
    spec = dataclasses.replace(CLIP, image_size=42)
    layouts.export(origins.open_clip_source(str(tmp_path / "in")), spec, tmp_path / "out", "open_clip")
    assert origins.open_clip_source(str(tmp_path / "out")).spec.image_size == 42


def test_what_is_read_back_is_compared(tmp_path, monkeypatch):
    """One flipped value in the file on its way to the disk, and nothing is exported."""
    written_by_open_clip(CLIP, tmp_path / "in")
    write = writers.write_safetensors

    def spoilt(path, content):
        arrays = {n: np.array(t) for n, t in content.items()}
        arrays["ln_final.bias"][3] += 1e-3
        write(path, arrays)

    monkeypatch.setattr(writers, "write_safetensors", spoilt)
    with pytest.raises(RunError, match="ln_final.bias"):
        layouts.export(origins.open_clip_source(str(tmp_path / "in")), CLIP, tmp_path / "out", "open_clip")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_what_open_clip_computes_is_compared(tmp_path, monkeypatch):
    """The right weights that open_clip runs to another result are no export."""
    written_by_open_clip(CLIP, tmp_path / "in")
    pooled = reference.open_clip_pooled
    monkeypatch.setattr(reference, "open_clip_pooled", lambda *a: pooled(*a) * 1.0002)
    with pytest.raises(RunError, match="computes other embeddings"):
        layouts.export(origins.open_clip_source(str(tmp_path / "in")), CLIP, tmp_path / "out", "open_clip")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_float16_overflow_is_refused(tmp_path):
    written_by_open_clip(CLIP, tmp_path / "in")
    source = origins.open_clip_source(str(tmp_path / "in"))
    big = Tensor((24,), np.dtype(np.float32), lambda: np.full(24, 1e6, np.float32))
    name = "visual.ln_post.bias"
    big = dataclasses.replace(big, shape=source.tensors[name].shape, read=lambda: np.full(48, 1e6, np.float32))
    source = dataclasses.replace(source, tensors=Tensors(dict(source.tensors) | {name: big}, source.files))
    with pytest.raises(UserError, match="does not fit float16"):
        layouts.export(source, CLIP, tmp_path / "out", "open_clip", dtype="float16")


def test_transformers_cannot_hold_every_text_tower():
    text = dataclasses.replace(CLIP.text, causal=False)
    with pytest.raises(UserError, match="use --format=open_clip"):
        hf.to_transformers(dataclasses.replace(CLIP, text=text), "float32")


@pytest.mark.parametrize("tag", list(TABLE))
def test_every_backbone_has_both_configs(tag):
    """The configs of an export describe what was exported."""

    def comparable(spec):
        return dataclasses.replace(
            spec, source="", open_clip_name="", **dict.fromkeys(("select", "add_text", "readout"), "")
        )

    spec = TABLE[tag]
    assert comparable(from_open_clip(to_open_clip(spec))) == comparable(spec)
    found, silent = hf.from_transformers(hf.to_transformers(spec, "float32"), hf.image_processor(spec), tag)
    assert comparable(found) == comparable(spec) and not silent


def test_round_trip_of_vit_b_32_at_full_size(tmp_path):
    """open_clip's own file, through our modules, to both layouts, every bit."""
    command = ["bench/roundtrip.py", "--config=configs/custom.py:ViT-B-32", "--norun", f"--tmp={tmp_path}"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for fmt in ("open_clip", "hf"):
        assert f"{fmt}: all 302 tensors are bit-identical to those of the original file" in done.stdout, done.stdout


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
    with pytest.raises(UserError, match="does not exist"):
        module["get_config"]("nothing/there.pt")
