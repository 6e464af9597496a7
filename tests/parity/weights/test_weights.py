"""`weights.load` for every kind of source, each written by its own library."""

import dataclasses
import re
import shutil

import jax.numpy as jnp
import numpy as np
import open_clip
import pytest
import small
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from flax import nnx
from helpers import close, randomise, refused
from open_clip.model import resize_pos_embed
from safetensors.torch import save_file
from specs import CLIP_FOLDER as CLIP, DINOV2, EVA02, OPENAI, SIGLIP_FOLDER as SIGLIP
from timm.layers import resample_abs_pos_embed
from torch_models import torch_model, torch_tower, written_by_open_clip
from transformers import CLIPTextConfig, CLIPTextModel

from diva_jax import weights
from diva_jax.models.backbones import Spec
from diva_jax.models.backbones.shared.open_clip_config import to_open_clip
from diva_jax.models.diffusion.text_encoder import TextEncoderConfig
from diva_jax.models.diffusion.unet import UNetConfig
from diva_jax.models.diffusion.vae import VAEConfig
from diva_jax.weights import names, origins


def clip_model(spec=CLIP):
    return randomise(open_clip.CLIP(**to_open_clip(spec)["model_cfg"]))


def state_dict(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items() if k != "attn_mask"}


def same(module, table, expected):
    """Every leaf of a module is bit-identical to the tensor of its name."""
    for name, array in names.to_torch(nnx.state(module), table).items():
        np.testing.assert_array_equal(array, expected[name].float().numpy(), err_msg=name)


def same_towers(source, expected, spec=CLIP):
    same(weights.load(str(source), spec), names.table("vision", spec), expected)
    same(weights.load(str(source), spec, tower="text"), names.table("text", spec), expected)


@pytest.fixture(scope="module")
def model():
    return clip_model()


@pytest.mark.parametrize("suffix", ["pt", "old.pth", "safetensors"])
@pytest.mark.parametrize("seed", range(6))
def test_open_clip_files(model, tmp_path, capsys, seed, suffix):
    """With prefixes of modules around the model, pickles bare or under the keys of training states, one in the other.
    Halves of both kinds are widened exactly; CustomTextCLIP's text tower has a prefix. What is not read is said."""
    rng, path, tensors = np.random.default_rng(seed), tmp_path / f"weights.{suffix}", state_dict(model)
    kind, modules = ("float32", "half", "text.")[seed % 3], seed // 2
    if kind == "half":
        tensors = {k: v.to(torch.float16 if "ln" in k else torch.bfloat16) for k, v in tensors.items()}
    elif kind == "text.":
        tensors = state_dict(randomise(open_clip.CustomTextCLIP(**to_open_clip(CLIP)["model_cfg"])))
        tensors.pop("text.attn_mask", None)
    prefix = "".join(rng.choice(["module.", "_orig_mod.", "model."], modules))
    content = {prefix + k: v.contiguous() for k, v in tensors.items()}
    average = {f"ema.{k}": v + 1 for k, v in tensors.items() if modules}
    if suffix == "safetensors":
        save_file(content | average, path)
    else:
        for key in rng.choice(["state_dict", "model_state_dict", "model", "module"], modules, replace=False):
            content = {"ema": average, "optimizer_state_dict": {"state": {}}, "loss": torch.ones(3), str(key): content}
        torch.save(content, path, _use_new_zipfile_serialization=suffix == "pt")
    same_towers(path, {k.removeprefix("text."): v for k, v in tensors.items()})
    loaded = weights.load(str(path), CLIP, param_dtype=jnp.bfloat16)
    same(loaded, names.table("vision", CLIP), {k: v.bfloat16() for k, v in tensors.items()})
    note = f"{len(tensors)} tensors whose names" if suffix == "safetensors" else "the tensors under ema are not read"
    assert (note in capsys.readouterr().out) == (modules > 0)


def test_open_clip_folder_and_the_file_in_it(model, tmp_path):
    written_by_open_clip(tmp_path / "clip", CLIP)
    same_towers(tmp_path / "clip", state_dict(model))
    gelu, file = dataclasses.replace(CLIP, activation="gelu"), tmp_path / "clip/open_clip_model.safetensors"
    for source in (tmp_path / "clip", f"local-dir:{tmp_path}/clip", file):
        refused("activation is 'quick_gelu' there and 'gelu' in the config", weights.load, str(source), gelu)


@pytest.mark.parametrize("layout", ["tower", "visual", "training state"])
def test_files_of_the_diva_authors(model, tmp_path, layout):
    tensors = state_dict(model)
    tower = {k: v for k, v in tensors.items() if k.startswith("visual.")}
    state = {f"class_model.model.{k}": v for k, v in tensors.items()}
    state |= {"class_model.final_fc.weight": torch.ones(1, 20), "unet.conv_in.weight": torch.ones(4, 4, 3, 3)}
    bare = {k.removeprefix("visual."): v for k, v in tower.items()}
    torch.save({"tower": bare, "visual": tower, "training state": state}[layout], tmp_path / "OpenAI-ViT-L-14-224.pth")
    source = str(tmp_path / "OpenAI-ViT-L-14-224.pth")
    same(weights.load(source, CLIP), names.table("vision", CLIP), tensors)
    if layout != "training state":
        refused("only a vision tower", weights.load, source, CLIP, tower="text")


def openai_archive(path):
    """Writes a TorchScript archive like OpenAI's, in float16 with sizes as buffers."""
    model = clip_model(OPENAI)
    for name, value in (("input_resolution", 30), ("context_length", 11), ("vocab_size", 99)):
        vars(model).pop(name, None)
        model.register_buffer(name, torch.tensor(value))
    inputs = torch.zeros(1, 3, 30, 30), torch.zeros(1, 11, dtype=torch.long)
    torch.jit.trace(model, inputs, check_trace=False).half().save(str(path))


def test_openai_archive(tmp_path, monkeypatch):
    """Refused; what the message says to run makes a state dict that describes itself as the archive did."""
    monkeypatch.chdir(tmp_path)
    openai_archive("ViT-tiny.pt")
    exec(refused("TorchScript", origins.open_source, "ViT-tiny.pt").split("is converted by: ")[1])  # noqa: S102
    expected = torch.load("weights.pt", weights_only=True)
    assert expected["visual.conv1.weight"].dtype == torch.float16
    same_towers("weights.pt", expected, OPENAI)
    found = origins.open_source("weights.pt")
    assert found.kind == "OpenAI state dict" and found.spec == OPENAI
    gelu = dataclasses.replace(OPENAI, activation="gelu")
    refused("activation is 'quick_gelu' there and 'gelu' in the config", weights.load, "weights.pt", gelu)


def test_torch_hub_dinov2(tmp_path):
    """The authors' state dict, which has the mask token of pretraining, bare or as a trained model's part."""
    tensors = torch_tower(DINOV2).state_dict()
    for prefix in ("", "module."):
        content = tensors | {"mask_token": torch.zeros(1, DINOV2.width)}
        torch.save({prefix + k: v for k, v in content.items()}, tmp_path / "dinov2.pth")
        found, table = weights.load(str(tmp_path / "dinov2.pth"), DINOV2), names.table("vision", DINOV2)
        same(found, table, {f"visual.{k}": v for k, v in tensors.items()})
    path, registers = str(tmp_path / "dinov2.pth"), dataclasses.replace(DINOV2, registers=4)
    refused("registers is 0 there and 4 in the config", weights.load, path, registers)
    refused("a dinov2 backbone has no text tower", weights.load, path, DINOV2, tower="text")


def test_open_clip_eva02(tmp_path):
    """The whole model's file, the tower alone, and learned position embeddings at another resolution."""
    tensors = state_dict(torch_model(EVA02))
    torch.save(tensors, tmp_path / "w.pt")
    torch.save({k.removeprefix("visual."): v for k, v in tensors.items() if "visual." in k}, tmp_path / "v.pt")
    same_towers(tmp_path / "w.pt", tensors, EVA02)
    same(weights.load(str(tmp_path / "v.pt"), EVA02), names.table("vision", EVA02), tensors)
    larger = weights.load(str(tmp_path / "w.pt"), dataclasses.replace(EVA02, image_size=54))
    want = resample_abs_pos_embed(tensors["visual.trunk.pos_embed"], [9, 9], num_prefix_tokens=1)
    close(larger.pos_embed[...], want, 2e-6)


@pytest.mark.parametrize("size", [42, 24])
def test_position_embeddings_at_another_resolution(model, tmp_path, size, capsys):
    """Up and down, as open_clip's own resize_pos_embed."""
    tensors = state_dict(model)
    torch.save(tensors, tmp_path / "w.pt")
    spec = dataclasses.replace(CLIP, image_size=size)
    ours = weights.load(str(tmp_path / "w.pt"), spec)
    resize_pos_embed(tensors, clip_model(spec))
    theirs = tensors["visual.positional_embedding"]
    close(ours.pos_embed[...], theirs, 2e-6)
    np.testing.assert_array_equal(ours.pos_embed[...][0], theirs[0].numpy())
    assert f"interpolated from 5 x 5 to {size // 6} x {size // 6}" in capsys.readouterr().out


UNET = small.diffusion()["unet"] | dict(block_out_channels=(32, 64), norm_num_groups=8)
VARIANTS = {"plain": {}, "ema": {}, "both": {}, "sharded": dict(max_shard_size="200KB")}
VARIANTS |= {"fp16": dict(variant="fp16"), "fp16 sharded": dict(variant="fp16", max_shard_size="100KB")}
BIN = dict(safe_serialization=False)
VARIANTS |= {"bin": BIN, "bin sharded": dict(BIN, max_shard_size="200KB")}


@pytest.mark.parametrize("kind", VARIANTS)
def test_diffusers_unet(tmp_path, kind):
    """Of `both`, full precision is preferred to a variant."""
    model, folder = randomise(UNet2DConditionModel(**UNET)), tmp_path / "unet"
    model = model.half() if "fp16" in kind else model
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    if kind == "ema":
        EMAModel(model.parameters(), model_cls=type(model), model_config=model.config).save_pretrained(folder)
    else:
        model.save_pretrained(folder, **VARIANTS[kind])
    if kind == "both":
        model.half().save_pretrained(folder, variant="fp16")
    files = [f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin")]
    assert (len(files) > 1) == ("sharded" in kind or kind == "both")
    for source in (tmp_path, folder):
        same(weights.load(str(source), UNetConfig.from_dict(UNET)), names.UNET, expected)


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_names(tensors):
    """As older versions named the attention of the VAE, and the text encoder, whose position ids they saved."""
    if any("attentions" in n for n in tensors):
        new = re.compile(r"attentions\.0\.(to_q|to_k|to_v|to_out\.0)\.")
        return {new.sub(lambda m: f"attentions.0.{OLD[m[1]]}.", n): t for n, t in tensors.items()}
    ids = {"text_model.embeddings.position_ids": torch.arange(9)[None]}
    return {f"text_model.{n.removeprefix('text_model.')}": t for n, t in tensors.items()} | ids


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_diffusers_vae_and_text_encoder(tmp_path, part):
    if part == "vae":
        options = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4)
        options |= dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
        model, spec, table = AutoencoderKL(**options), VAEConfig.from_dict(options), names.VAE
    else:
        options = dict(vocab_size=60, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
        model = CLIPTextModel(CLIPTextConfig(**options, max_position_embeddings=9, hidden_act="gelu"))
        spec, table = TextEncoderConfig(60, 9, 24, 2, 2, 48), names.TEXT_ENCODER
    randomise(model).save_pretrained(tmp_path / part)
    expected = {k.removeprefix("text_model."): v for k, v in model.state_dict().items()}
    shutil.copytree(tmp_path / part, tmp_path / "old")
    (file,) = (tmp_path / "old").glob("*.safetensors")
    save_file(old_names(expected), file)
    for folder in (tmp_path, tmp_path / "old"):
        same(weights.load(str(folder), spec), table, expected)
    if part == "text_encoder":
        deeper = dataclasses.replace(spec, layers=3)
        refused("layers is 2 there and 3 in the config", weights.load, str(tmp_path), deeper)


def test_files_that_do_not_fit_say_what_was_found(model, tmp_path):
    tensors = state_dict(model)
    unknown, state = {"conv.weight": torch.ones(3)}, {"epoch": 3, "student": tensors, "teacher": {}}
    for content, spec, says in (
        (tensors, Spec(), "width is 48 there and 1024 in the config; layers is 2 there and 24"),
        (tensors, SIGLIP, "arch is 'vit' there and 'siglip' in the config"),
        (unknown, CLIP, "no vision tower of a known architecture"),
        (state, CLIP, "holds a dict of epoch, student, teacher, where .*bare or under state_dict or"),
    ):
        torch.save(content, tmp_path / "w.pt")
        refused(says, weights.load, str(tmp_path / "w.pt"), spec)
    torch.save(torch_tower(DINOV2).state_dict(), tmp_path / "dinov2.pth")
    bare = origins.open_source(str(tmp_path / "dinov2.pth"))  # Only those with a row are described.
    refused("does not specify the number of heads", bare.described, "x")
