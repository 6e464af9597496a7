"""Small models of open_clip's classes and tokenizers, for the tests that compare with it."""

import argparse
import shutil
import tarfile
from pathlib import Path

import open_clip
import sentencepiece
import torch
from helpers import randomise, tensors
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from transformers import SiglipTokenizer, T5Tokenizer

from diva_jax.data.tokenizers import siglip_clean
from diva_jax.models.backbones import Spec
from diva_jax.weights.writers import write_safetensors


class _Siglip(torch.nn.Module):
    """A timm tower where open_clip keeps it, under `visual.trunk`."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.trunk = VisionTransformer(
            img_size=spec.image_size,
            patch_size=spec.patch_size,
            embed_dim=spec.width,
            depth=spec.layers,
            num_heads=spec.heads,
            mlp_ratio=(spec.mlp_dim + 0.5) / spec.width,
            class_token=False,
            global_pool="map",
            num_classes=0,
        )

    def forward(self, x):
        return self.trunk(x)


def torch_model(spec: Spec, seed: int = 5) -> torch.nn.Module:
    """open_clip's whole model, random."""
    text, siglip = spec.text, spec.arch == "siglip"
    kind = open_clip.CustomTextCLIP if siglip else open_clip.CLIP
    vision = dict(image_size=spec.image_size, patch_size=spec.patch_size, width=spec.width, layers=spec.layers)
    model = kind(
        embed_dim=spec.embed_dim,
        quick_gelu=spec.activation == "quick_gelu",
        init_logit_bias=-10 if siglip else None,
        vision_cfg=vision | dict(head_width=spec.width // spec.heads),
        text_cfg=dict(
            context_length=text.context_length,
            vocab_size=text.vocab_size,
            width=text.width,
            heads=text.heads,
            layers=text.layers,
            mlp_ratio=text.mlp_dim / text.width,
            no_causal_mask=not text.causal,
            pool_type=text.pool,
            proj_bias=text.proj_bias,
            norm_kwargs=dict(eps=text.norm_eps),
        ),
    )
    if siglip:
        model.visual = _Siglip(spec)
    with torch.no_grad():
        scale = model.logit_scale.clone()
        randomise(model, seed)
        model.logit_scale.copy_(scale)
    return model


def centred(model: torch.nn.Module, spec: Spec, pictures: list[Image.Image], texts: list[str]) -> torch.nn.Module:
    """A CLIP model without what all these embeddings share: a random one finds everything alike.

    The projections lose the direction of the mean embedding.
    """
    prepare = open_clip.image_transform(spec.image_size, is_train=False, mean=spec.mean, std=spec.std)
    with torch.no_grad():
        images = model.encode_image(torch.stack([prepare(p) for p in pictures]))
        words = model.encode_text(open_clip.SimpleTokenizer()(texts))
        for projection, embeddings in ((model.visual.proj, images), (model.text_projection, words)):
            u = torch.nn.functional.normalize(embeddings.mean(0), dim=0)
            projection -= torch.outer(projection @ u, u)
    return model


def write_model(folder: Path, model: torch.nn.Module) -> Path:
    """Weights and CLIP's tokenizer in a folder, as a source."""
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "open_clip_model.safetensors", tensors(model))
    shutil.copy(open_clip.tokenizer.default_bpe(), folder / "bpe_simple_vocab_16e6.txt.gz")
    return folder


def write_siglip_tokenizer(out: Path, layout: str = "timm") -> Path:
    """A small SentencePiece vocabulary as open_clip's hub folders ("timm") or "transformers" ones hold it."""
    lines = Path(tarfile.__file__).read_text().splitlines() + Path(argparse.__file__).read_text().splitlines()
    lines = [s for line in lines for s in (line.strip(), siglip_clean(line)) if s]
    train = out / "train"
    train.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(train / "spiece"),
        vocab_size=900,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    folder = out / layout
    if layout == "timm":
        T5Tokenizer.from_pretrained(train, pad_token="</s>", extra_ids=0, legacy=False).save_pretrained(folder)
        assert (folder / "tokenizer.json").exists()
    else:
        SiglipTokenizer(str(train / "spiece.model"), pad_token="</s>").save_pretrained(folder)
        assert (folder / "spiece.model").exists()
    return folder
