"""Folders of transformers, followed from the image and the text: features are those of its own pipeline."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from clip_folders import transformers_folder
from helpers import close
from PIL import Image
from specs import CLIP_FOLDER, DINOV2, DINOV2_REG, SIGLIP2_FOLDER, SIGLIP_FOLDER
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, CLIPTokenizer, SiglipImageProcessorPil

import diva_jax
from diva_jax import demo
from diva_jax.common.errors import UserError
from diva_jax.data import tokenizers
from diva_jax.models.backbones import TextSpec
from diva_jax.weights import hf, origins, writers

MODELS = {
    "clip": (CLIP_FOLDER, CLIPImageProcessorPil),
    "siglip": (SIGLIP_FOLDER, SiglipImageProcessorPil),
    "siglip2": (SIGLIP2_FOLDER, SiglipImageProcessorPil),
    "dinov2": (DINOV2, BitImageProcessorPil),
    "dinov2_reg": (DINOV2_REG, BitImageProcessorPil),
}


def processor(kind, spec, rng):
    """A processor with a generated size, crop and filter; DINOv2's images may be of another size than its weights'."""
    crop = spec.image_size
    if spec.arch == "dinov2":
        crop = int(rng.choice([30, 42, 45]))
    options = dict(
        resample=int(rng.integers(6)), image_mean=rng.uniform(0.3, 0.6, 3), image_std=rng.uniform(0.2, 0.4, 3)
    )
    options = {k: v if isinstance(v, int) else v.tolist() for k, v in options.items()}
    side = crop + int(rng.integers(1, 20))
    if spec.arch == "siglip" or rng.integers(4) == 0:
        return kind(size=dict(height=crop, width=crop), do_center_crop=False, **options)
    size = dict(shortest_edge=side) if rng.integers(3) else dict(height=side, width=side)
    return kind(size=size, crop_size=dict(height=crop, width=crop), **options)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", MODELS)
def test_images(tmp_path, name, seed):
    spec, kind = MODELS[name]
    rng = np.random.default_rng(seed)
    model, prepare = transformers_folder(tmp_path, spec), processor(kind, spec, rng)
    prepare.save_pretrained(tmp_path)
    image = Image.fromarray(rng.integers(0, 255, (*rng.integers(40, 100, 2), 3), np.uint8))
    with torch.no_grad():
        pixels = prepare(image, return_tensors="pt")["pixel_values"]
        want = getattr(model, "get_image_features", model)(pixel_values=pixels).pooler_output.numpy()
    close(diva_jax.load(str(tmp_path)).encode_image([image]), want, 2e-5)
    if spec.arch != "siglip":  # An export keeps the preparation.
        found = origins.open_source(str(tmp_path)).spec
        assert hf.from_transformers(hf.to_transformers(found, "float32"), hf.image_processor(found), "a")[0] == found


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("size", {"shortest_edge": 20}),
        ("size", {"height": 30, "width": 31}),
        ("size", {"longest_edge": 30}),
        ("crop_size", 24),
        ("do_center_crop", False),
        ("do_resize", False),
        ("do_rescale", False),
        ("rescale_factor", 1.0),
        ("resample", 9),
        ("crop_pct", 0.9),
        ("image_processor_type", "OtherImageProcessor"),
    ],
)
def test_preparations_that_are_not_implemented_are_refused(option, value):
    config, preprocessor = hf.to_transformers(CLIP_FOLDER, "float32"), hf.image_processor(CLIP_FOLDER)
    with pytest.raises(UserError, match=rf"x/preprocessor_config.json has .*{option}'?="):
        hf.from_transformers(config, preprocessor | {option: value}, "x")


def test_older_forms_of_the_configs():
    """Sizes as numbers, and towers in `*_config_dict`."""
    config, preprocessor = hf.to_transformers(CLIP_FOLDER, "float32"), hf.image_processor(CLIP_FOLDER)
    old = config | {"vision_config": {}, "text_config": {"hidden_size": 8}}
    old |= {f"{t}_config_dict": config[f"{t}_config"] for t in ("vision", "text")}
    sizes = dict(size=30, crop_size=30, feature_extractor_type="CLIPFeatureExtractor", image_processor_type=None)
    assert hf.from_transformers(old, preprocessor | sizes, "x")[0] == CLIP_FOLDER


TEXTS = ["a photo of a cat", "a photo of <cat-toy>", "<CAT-TOY>s and <New>, not <new>", "x<cat-toy>y"]


@pytest.mark.parametrize("written", ["tokenizer.json", "added_tokens.json"])
def test_added_tokens_of_clip(tmp_path, written):
    """Matched as transformers does, and the state is pooled at the end token, which is no longer the highest id."""
    demo.write_byte_tokenizer(tmp_path)
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    theirs.add_tokens(["<cat-toy>"])
    if written == "tokenizer.json":
        theirs.add_special_tokens({"additional_special_tokens": ["<New>"]})
    text = TextSpec(context_length=77, vocab_size=len(theirs), width=48, heads=4, layers=2, mlp_dim=96)
    text = dataclasses.replace(text, pool="eos", eos_id=theirs.eos_token_id)
    model = transformers_folder(tmp_path, dataclasses.replace(CLIP_FOLDER, text=text))
    if written == "tokenizer.json":
        theirs.save_pretrained(tmp_path)
    else:
        (tmp_path / written).write_text(json.dumps({"<cat-toy>": len(theirs) - 1}))
    texts = TEXTS if written == "tokenizer.json" else TEXTS[:2]
    encoded = theirs(texts, padding="max_length", max_length=77, return_tensors="pt")
    ours = tokenizers.open_tokenizer(text, tmp_path)(texts)
    for mine, row, mask in zip(ours, encoded["input_ids"].numpy(), encoded["attention_mask"].numpy(), strict=True):
        np.testing.assert_array_equal(mine[: mask.sum()], row[: mask.sum()])
    with torch.no_grad():
        want = model.get_text_features(**encoded).pooler_output.numpy()
    close(diva_jax.load(str(tmp_path)).encode_text(texts), want, 2e-5)


def test_siglip2_texts(tmp_path):
    """In lower case, and padded to the context: 64 tokens as published."""
    from transformers import Siglip2Tokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocab = {t: i for i, t in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *letters])}
    theirs = Siglip2Tokenizer(vocab=vocab, merges=[], padding_side="right")
    spec = dataclasses.replace(
        SIGLIP2_FOLDER, text=dataclasses.replace(SIGLIP2_FOLDER.text, context_length=64, vocab_size=len(vocab))
    )
    model = transformers_folder(tmp_path, spec)
    theirs.save_pretrained(tmp_path)
    writers.write_json(tmp_path / "preprocessor_config.json", hf.image_processor(spec) | {"do_center_crop": False})
    texts = ["A Photo of a CAT", "dog"]
    ids = theirs(texts, padding="max_length", max_length=64, truncation=True, return_tensors="pt")["input_ids"]
    assert ids.shape == (2, 64)
    with torch.no_grad():
        want = model.get_text_features(input_ids=ids).pooler_output.numpy()
    close(diva_jax.load(str(tmp_path)).encode_text(texts), want, 2e-5)
