"""Small models and data sets for the tests of evaluation: open_clip's classes, scikit-image's photographs."""

import argparse
import dataclasses
import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import sentencepiece
import skimage.data
import torch
from helpers import randomise, tensors
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from transformers import SiglipTokenizer, T5Tokenizer

from diva_jax import config
from diva_jax.backbones import HALF, Spec, TextSpec
from diva_jax.evals.mmvp import FOLDERS, HEADER, PATTERNS, PER_PATTERN
from diva_jax.tokenizers import siglip_clean
from diva_jax.weights.writers import write_safetensors

_TEXT = TextSpec(width=32, heads=2, layers=2, mlp_dim=128)
CLIP = Spec(
    image_size=42,
    patch_size=14,
    width=48,
    layers=2,
    heads=3,
    mlp_dim=192,
    embed_dim=20,
    readout="cls + mean(random 5), l2",
    text=_TEXT,
)
SIGLIP = Spec(
    arch="siglip",
    image_size=38,
    patch_size=7,
    width=48,
    layers=2,
    heads=3,
    mlp_dim=137,
    embed_dim=48,
    activation="gelu",
    norm_eps=1e-6,
    mean=HALF,
    std=HALF,
    resize_mode="squash",
    readout="l2(cls)",
    text=dataclasses.replace(
        _TEXT,
        context_length=64,
        vocab_size=2000,
        width=36,
        causal=False,
        pool="last",
        proj_bias=True,
        norm_eps=1e-6,
        mlp_dim=144,
        tokenizer="siglip",
    ),
)
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket", "camera", "logo")


TEXTS = [
    "a photo of a dog looking to the left.",
    "A Photo, of  the\tDOG's   two\nears -- isn't it? we'll see: they've 12345 hairs (3.14 %)",
    "a photo of a butterfly's wings, the_under_side; snake_case & CamelCase",
    "",
    "   \n ",
    "!!! ... ???",
    "😀 a 👩‍👩‍👧 family of 🐈‍⬛ cats ❤️",
    "une tasse de café, naïve façade, Straße, İstanbul, ﬁancé, Ⅷ ½ ²",
    "写真 の 猫 и кошка على العشب",
    "&lt;b&gt;bold&lt;/b&gt; &amp;amp; schÃ¶n â€œquotedâ€\x9d",
    "<start_of_text> in the text <end_of_text> <|endoftext|>",
    "word " * 200,
    "supercalifragilisticexpialidocious" * 20,
    "x" * 74,
    "1 " * 75,
]


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


def statement(row: int) -> str:
    """Of the MMVP data below."""
    return f"thing number {row * 7}, seen from {'left' if row % 2 else 'above'}"


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


def eval_config(spec: Spec, source: Path):
    return config.default(dataclasses.replace(spec, source=str(source)))


def photograph(name: str) -> Image.Image:
    return Image.fromarray(getattr(skimage.data, name)())


def patch(index: int) -> Image.Image:
    """A piece of a photograph, another for each index; no two of one size in a row."""
    rng = np.random.default_rng(index)
    whole = photograph(PHOTOGRAPHS[index % 4])
    w, h = 50 + index % 17, 45 + index % 13
    left, top = rng.integers(0, whole.width - 2 * w), rng.integers(0, whole.height - 2 * h)
    return whole.crop((left, top, left + 2 * w, top + 2 * h)).resize((w, h))


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    data = io.BytesIO()
    image.save(data, form)
    return data.getvalue()


def write_mmvp(root: Path, folder: str = FOLDERS[0]) -> Path:
    """135 pairs of pieces of photographs with statements of their own."""
    lines = [",".join(HEADER)]
    for row in range(2 * PER_PATTERN * len(PATTERNS)):
        type_ = PATTERNS[row // (2 * PER_PATTERN)].split()[0]
        path = root / folder / type_ / f"{row + 1}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(patch(row), "JPEG"))
        lines.append(f'{row + 1},{type_},"{statement(row)}"')
    (root / "Questions.csv").write_text("\n".join(lines) + "\n")
    return root
