"""`weights.load` from every kind of source, each written by the library that it belongs to."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import open_clip
import pytest
import torch
from flax import nnx
from safetensors.torch import save_file

from diva_jax import weights
from diva_jax.backbones import HALF, Spec, TextSpec
from diva_jax.backbones.open_clip_config import from_open_clip, to_open_clip
from diva_jax.diffusion.text_encoder import TextEncoderConfig
from diva_jax.diffusion.unet import UNetConfig
from diva_jax.diffusion.vae import VAEConfig
from diva_jax.errors import UserError
from diva_jax.weights import clip, diffusers, hf, names, readers, sources
from helpers import randomise, relative_error

CLIP = Spec(
    image_size=30,
    patch_size=6,
    width=48,
    layers=2,
    heads=3,
    mlp_dim=96,
    embed_dim=20,
    text=TextSpec(context_length=11, vocab_size=99, width=128, heads=2, layers=2, mlp_dim=512),
)
SIGLIP = Spec(
    arch="siglip",
    image_size=42,
    patch_size=14,
    width=48,
    layers=2,
    heads=4,
    mlp_dim=100,
    embed_dim=48,
    activation="gelu",
    norm_eps=1e-6,
    mean=HALF,
    std=HALF,
    resize_mode="squash",
    text=TextSpec(10, 77, 48, 4, 2, 100, causal=False, pool="last", proj_bias=True, norm_eps=1e-6, tokenizer="siglip"),
)


def clip_model(spec=CLIP):
    return randomise(open_clip.CLIP(**{k: v for k, v in to_open_clip(spec)["model_cfg"].items()}))


def state_dict(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items() if k != "attn_mask"}


def same(module, table, expected):
    """Every leaf of a module is bit for bit the tensor of its name."""
    for name, array in names.to_torch(nnx.state(module), table).items():
        np.testing.assert_array_equal(array, expected[name].float().numpy(), err_msg=name)


def same_towers(source, expected, spec=CLIP):
    same(weights.load(str(source), spec), clip.vision_table(spec), expected)
    same(weights.load(str(source), spec, tower="text"), clip.text_table(spec), expected)


@pytest.fixture(scope="module")
def model():
    return clip_model()


def wrap(kind, tensors):
    if kind == "module":
        return {f"module.{k}": v for k, v in tensors.items()}
    if kind == "state_dict":
        return {"state_dict": {f"module.{k}": v for k, v in tensors.items()}, "epoch": 3}
    return tensors


@pytest.mark.parametrize("kind", ["plain", "module", "state_dict"])
@pytest.mark.parametrize("suffix", ["pt", "bin", "old.pth"])
def test_open_clip_pickles(model, tmp_path, kind, suffix):
    path, tensors = tmp_path / f"weights.{suffix}", state_dict(model)
    torch.save(wrap(kind, tensors), path, _use_new_zipfile_serialization=not suffix.startswith("old"))
    same_towers(path, tensors)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_open_clip_safetensors(model, tmp_path, prefix):
    tensors = state_dict(model)
    save_file({prefix + k: v.contiguous() for k, v in tensors.items()}, tmp_path / "w.safetensors")
    same_towers(tmp_path / "w.safetensors", tensors)


def test_bfloat16_and_float16_widen_exactly(model, tmp_path):
    half = {k: v.to(torch.float16 if "ln" in k else torch.bfloat16) for k, v in state_dict(model).items()}
    save_file({k: v.contiguous() for k, v in half.items()}, tmp_path / "w.safetensors")
    torch.save(half, tmp_path / "w.pt")
    same_towers(tmp_path / "w.safetensors", half)
    same_towers(tmp_path / "w.pt", half)


def test_held_in_the_dtype_asked_for(model, tmp_path):
    tensors = state_dict(model)
    torch.save(tensors, tmp_path / "w.pt")
    loaded = weights.load(str(tmp_path / "w.pt"), CLIP, param_dtype=jnp.bfloat16)
    same(loaded, clip.vision_table(CLIP), {k: v.bfloat16() for k, v in tensors.items()})


def test_open_clip_folder_and_the_file_in_it(model, tmp_path):
    save_file({k: v.contiguous() for k, v in state_dict(model).items()}, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(to_open_clip(CLIP)))
    same_towers(tmp_path, state_dict(model))
    gelu = dataclasses.replace(CLIP, activation="gelu")
    for source in (tmp_path, f"local-dir:{tmp_path}", tmp_path / "open_clip_model.safetensors"):
        with pytest.raises(UserError, match="activation is 'quick_gelu' there and 'gelu' in the config"):
            weights.load(str(source), gelu)


def test_custom_text_names(tmp_path):
    cfg = {k: v for k, v in to_open_clip(CLIP)["model_cfg"].items()}
    tensors = state_dict(randomise(open_clip.CustomTextCLIP(**cfg)))
    tensors.pop("text.attn_mask", None)
    torch.save(tensors, tmp_path / "w.pt")
    same_towers(tmp_path / "w.pt", {k.removeprefix("text."): v for k, v in tensors.items()})


@pytest.mark.parametrize("layout", ["tower", "visual", "training state"])
def test_files_of_the_diva_authors(model, tmp_path, layout):
    tensors = state_dict(model)
    tower = {k: v for k, v in tensors.items() if k.startswith("visual.")}
    content = {
        "tower": {k.removeprefix("visual."): v for k, v in tower.items()},
        "visual": tower,
        "training state": {f"class_model.model.{k}": v for k, v in tensors.items()}
        | {"class_model.final_fc.weight": torch.ones(1, 20), "unet.conv_in.weight": torch.ones(4, 4, 3, 3)},
    }[layout]
    torch.save(content, tmp_path / "OpenAI-ViT-L-14-224.pth")
    source = str(tmp_path / "OpenAI-ViT-L-14-224.pth")
    same(weights.load(source, CLIP), clip.vision_table(CLIP), tensors)
    if layout != "training state":
        with pytest.raises(UserError, match="vision tower alone"):
            weights.load(source, CLIP, tower="text")


OPENAI = dataclasses.replace(CLIP, width=128, heads=2)


def openai_archive(path):
    """Writes a TorchScript archive as OpenAI's are, float16 and sizes as buffers; returns its tensors."""
    model = randomise(open_clip.CLIP(**to_open_clip(OPENAI)["model_cfg"]))
    for name, value in (("input_resolution", 30), ("context_length", 11), ("vocab_size", 99)):
        vars(model).pop(name, None)
        model.register_buffer(name, torch.tensor(value))
    inputs = torch.zeros(1, 3, 30, 30), torch.zeros(1, 11, dtype=torch.long)
    torch.jit.trace(model, inputs, check_trace=False).half().save(str(path))
    return torch.jit.load(str(path), map_location="cpu").state_dict()


def test_openai_archive(tmp_path):
    expected = openai_archive(tmp_path / "ViT-tiny.pt")
    assert expected["visual.conv1.weight"].dtype == torch.float16
    same_towers(tmp_path / "ViT-tiny.pt", expected, OPENAI)
    found = sources.open_clip_source(str(tmp_path / "ViT-tiny.pt"))
    assert found.kind == "OpenAI archive" and found.spec == OPENAI
    with pytest.raises(UserError, match="activation is 'quick_gelu' there and 'gelu' in the config"):
        weights.load(str(tmp_path / "ViT-tiny.pt"), dataclasses.replace(OPENAI, activation="gelu"))
