"""Small towers, models and folders of open_clip, timm and transformers, and tokenizers, with random weights."""

import argparse
import dataclasses
import functools
import string
import tarfile
import tempfile
from collections import OrderedDict
from pathlib import Path

import chex
import numpy as np
import open_clip
import sentencepiece
import timm.models.vision_transformer as timm_vit
import torch
from helpers import randomise, tensors
from open_clip.push_to_hf_hub import save_config_for_hf
from open_clip.transformer import QuickGELU, VisionTransformer
from PIL import Image
from safetensors.torch import save_file
from specs import CLIP_FOLDER
from timm.layers import SwiGLUPacked
from timm.models.eva import Eva
from transformers import PreTrainedTokenizerFast, Siglip2Tokenizer, SiglipTokenizer, T5Tokenizer

from diva_jax.data.tokenizers import siglip_clean
from diva_jax.models.backbones import Spec
from diva_jax.models.backbones.shared.open_clip_config import to_open_clip
from diva_jax.weights import names


def _ratio(spec: Spec, times: int = 1) -> float:
    """Returns a ratio for which `int(width * ratio)` is the width of the MLP."""
    return (spec.mlp_dim * times + 0.5) / spec.width


def _vit(spec: Spec) -> torch.nn.Module:
    sizes = (spec.image_size, spec.patch_size, spec.width, spec.layers, spec.heads, _ratio(spec))
    activation = QuickGELU if spec.activation == "quick_gelu" else torch.nn.GELU
    norm = functools.partial(torch.nn.LayerNorm, eps=spec.norm_eps)
    return VisionTransformer(*sizes, output_dim=spec.embed_dim, act_layer=activation, norm_layer=norm)


def _sizes(spec: Spec) -> dict:
    sizes = dict(img_size=spec.image_size, patch_size=spec.patch_size, embed_dim=spec.width)
    return sizes | dict(depth=spec.layers, num_heads=spec.heads)


def _siglip(spec: Spec) -> torch.nn.Module:
    options = dict(mlp_ratio=_ratio(spec), class_token=False, global_pool="map", num_classes=0)
    return timm_vit.VisionTransformer(**_sizes(spec), **options)


def _eva02(spec: Spec) -> torch.nn.Module:
    options = dict(qkv_fused=False, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True, use_rot_pos_emb=True)
    options |= dict(ref_feat_shape=(16, 16), global_pool="token")
    return Eva(**_sizes(spec), mlp_ratio=_ratio(spec), num_classes=spec.embed_dim, **options)


class Dinov2(timm_vit.VisionTransformer):
    """timm's tower, with position embeddings for the class token and none for registers, as in the authors' code."""

    def _pos_embed(self, x):
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)


def _dinov2(spec: Spec) -> torch.nn.Module:
    swiglu = spec.activation == "swiglu"
    options = dict(mlp_layer=SwiGLUPacked, act_layer=torch.nn.SiLU) if swiglu else {}
    options |= dict(mlp_ratio=_ratio(spec, 1 + swiglu), init_values=1.0, num_classes=0)
    if not spec.registers:
        return timm_vit.VisionTransformer(**_sizes(spec), **options)
    tower = Dinov2(**_sizes(spec), **options)
    tower.register_tokens = torch.nn.Parameter(torch.zeros(1, spec.registers, spec.width))
    tower.num_prefix_tokens += spec.registers
    return tower


_MAKE = {"vit": _vit, "siglip": _siglip, "eva02": _eva02, "dinov2": _dinov2}
PREFIX = {"vit": "visual.", "siglip": "visual.trunk.", "eva02": "visual.trunk.", "dinov2": "visual."}


def torch_tower(spec: Spec) -> torch.nn.Module:
    return randomise(_MAKE[spec.arch](spec), seed=spec.width)


def checkpoint_name(spec: Spec, name: str) -> str:
    if spec.activation == "swiglu":
        name = name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
    return PREFIX[spec.arch] + name


def checkpoint(spec: Spec, tower: torch.nn.Module) -> dict[str, np.ndarray]:
    return {checkpoint_name(spec, k): v for k, v in tensors(tower).items()}


def torch_features(tower: torch.nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [B, 3, H, W] -> (tokens, pooled): pooled is the library's result, tokens are computed in the same way."""
    if isinstance(tower, VisionTransformer):
        return (tower.ln_post(tower.transformer(tower._embeds(images))) @ tower.proj)[:, 1:], tower(images)
    tokens = tower.forward_features(images)[:, tower.num_prefix_tokens :]
    return (tower.head(tokens) if isinstance(tower, Eva) else tokens), tower(images)


def torch_model(spec: Spec, seed: int = 5) -> torch.nn.Module:
    timm_tower = spec.arch != "vit"
    kind, bias = open_clip.CustomTextCLIP if timm_tower else open_clip.CLIP, -10 if spec.arch == "siglip" else None
    like = dataclasses.replace(spec, arch="vit", activation=spec.text.activation or spec.activation)
    model = kind(**to_open_clip(like)["model_cfg"], init_logit_bias=bias)
    if timm_tower:
        model.visual = torch.nn.Sequential(OrderedDict(trunk=torch_tower(spec)))  # Its names, as in open_clip.
    with torch.no_grad():
        scale = model.logit_scale.clone()
        randomise(model, seed)
        model.logit_scale.copy_(scale)
    return model


def centred(model: torch.nn.Module, spec: Spec, pictures: list[Image.Image], texts: list[str]) -> torch.nn.Module:
    """Removes the direction of the mean embedding from the projections of a CLIP model, whose embeddings of random
    weights are otherwise too similar."""
    prepare = open_clip.image_transform(spec.image_size, is_train=False, mean=spec.mean, std=spec.std)
    with torch.no_grad():
        images = model.encode_image(torch.stack([prepare(p) for p in pictures]))
        words = model.encode_text(open_clip.SimpleTokenizer()(texts))
        for projection, embeddings in ((model.visual.proj, images), (model.text_projection, words)):
            u = torch.nn.functional.normalize(embeddings.mean(0), dim=0)
            projection -= torch.outer(projection @ u, u)
    return model


@functools.cache
def _sentencepiece() -> tempfile.TemporaryDirectory:
    lines = Path(tarfile.__file__).read_text().splitlines() + Path(argparse.__file__).read_text().splitlines()
    lines = [s for line in lines for s in (line.strip(), siglip_clean(line)) if s]
    options = dict(vocab_size=900, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    folder = tempfile.TemporaryDirectory()
    prefix = f"{folder.name}/spiece"
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_prefix=prefix, **options)
    return folder


def write_siglip_tokenizer(folder: Path, layout: str) -> None:
    """Writes a small tokenizer as hub folders have it: "timm" or "transformers" for SigLIP's, "gemma" for SigLIP 2's,
    "xlm" for MetaCLIP 2's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    train = _sentencepiece().name
    if layout == "timm":
        T5Tokenizer.from_pretrained(train, pad_token="</s>", extra_ids=0, legacy=False).save_pretrained(folder)
        assert (folder / "tokenizer.json").exists()
    elif layout == "transformers":
        SiglipTokenizer(f"{train}/spiece.model", pad_token="</s>").save_pretrained(folder)
        assert (folder / "spiece.model").exists()
    elif layout == "gemma":
        tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_lowercase]
        vocab = {token: i for i, token in enumerate(tokens)}
        Siglip2Tokenizer(vocab=vocab, merges=[], padding_side="right").save_pretrained(folder)
    else:
        first = ["<s>", "<pad>", "</s>", "<unk>"]
        pieces = sentencepiece.SentencePieceProcessor(f"{train}/spiece.model")
        vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
        words = [pair for pair in vocab if pair[0] not in first]
        tokenizer = Tokenizer(models.Unigram([*((t, 0.0) for t in first), *words], unk_id=3))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        special = [(t, i) for i, t in enumerate(first)]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
        options = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right")
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(folder)


def transformers_folder(folder, spec=CLIP_FOLDER, **save):
    """Writes and returns the model of transformers that a spec describes; `save` as for `save_pretrained`."""
    import transformers

    config = names.transformers_configs(spec)[0]
    (kind,) = config.pop("architectures")
    if spec.has_text:
        config = {k: v for k, v in config.items() if k in ("vision_config", "text_config", "projection_dim")}
    model = getattr(transformers, kind)(getattr(transformers, kind.replace("Model", "Config"))(**config))
    randomise(model).save_pretrained(folder, **save)
    return model


def equal(ours, theirs):
    """Asserts that two mappings contain the same tensors, bit-identical."""
    chex.assert_trees_all_equal(*({name: np.asarray(a) for name, a in of.items()} for of in (ours, theirs)))


def written_by_open_clip(folder, spec=CLIP_FOLDER, model=None):
    """Writes a CLIP of `spec`, random by default, as open_clip does, but as safetensors; returns its tensors."""
    folder.mkdir()
    model = model or randomise(open_clip.CLIP(**to_open_clip(spec)["model_cfg"]))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    open_clip.model.set_model_preprocess_cfg(model, to_open_clip(spec)["preprocess_cfg"])
    save_config_for_hf(model, folder / "open_clip_config.json", to_open_clip(spec)["model_cfg"])
    return tensors(model)
