"""Logits of photographs and sentences against open_clip's transform, tokenizer and models."""

import numpy as np
import open_clip
import pytest
import torch
from eval_data import PHOTOGRAPHS, TEXTS, eval_config, photograph
from eval_models import torch_model, write_model, write_siglip_tokenizer
from helpers import close
from open_clip.pretrained import get_pretrained_cfg
from PIL import Image
from specs import EVAL_CLIP as CLIP
from specs import EVAL_SIGLIP as SIGLIP

from diva_jax.data import images
from diva_jax.data.tokenizers import open_tokenizer
from diva_jax.evals import Settings, encode
from diva_jax.models.backbones import TABLE
from diva_jax.training import sharding

PUBLISHED = {
    "vitl14": "openai",
    "vitl14_336": "openai",
    "metaclip_l14": "metaclip_fullcc",
    "metaclip_h14": "metaclip_fullcc",
    "dfn_h14": "dfn5b",
    "dfn_h14_378": "dfn5b",
    "siglip_so400m": "webli",
    "siglip_so400m_384": "webli",
}


def transform(spec):
    return open_clip.image_transform(
        spec.image_size,
        is_train=False,
        mean=spec.mean,
        std=spec.std,
        resize_mode=spec.resize_mode,
        interpolation=spec.interpolation,
    )


def example_images() -> dict[str, Image.Image]:
    """Photographs, every mode that is not RGB, sizes that round to either side, small and thin ones."""
    by_name = {name: photograph(name) for name in PHOTOGRAPHS}
    rgb = by_name["chelsea"]
    by_name |= {mode: rgb.convert(mode) for mode in ("P", "LA", "RGBA", "1", "CMYK")}
    by_name["alpha"] = rgb.convert("RGBA")
    by_name["alpha"].putalpha(Image.linear_gradient("L").resize(rgb.size))
    sizes = ((5, 9), (301, 37), (37, 512), (224, 224), (225, 224), (224, 227), (333, 334), (450, 449))
    return by_name | {f"{w}x{h}": rgb.resize((w, h)) for w, h in sizes}


def prepared_as(spec):
    return spec.image_size, spec.resize_mode, spec.interpolation


@pytest.mark.parametrize("tag", TABLE)
def test_preparation_is_the_published_one(tag):
    spec = TABLE[tag]
    published = get_pretrained_cfg(spec.open_clip_name, PUBLISHED[tag])
    mode = {"bicubic": spec.interpolation, "shortest": "shortest", "squash": "squash"}
    assert spec.mean == tuple(published["mean"]) and spec.std == tuple(published["std"])
    assert spec.resize_mode == mode[published.get("resize_mode", "shortest")]
    assert spec.interpolation == published.get("interpolation", "bicubic")


@pytest.mark.parametrize("setting", sorted({*map(prepared_as, TABLE.values()), (65, "shortest", "bilinear")}))
def test_uint8_stage_is_bit_for_bit_open_clips(setting):
    size, mode, interpolation = setting
    theirs = open_clip.image_transform(size, is_train=False, resize_mode=mode, interpolation=interpolation)
    for name, image in example_images().items():
        want = image
        for step in theirs.transforms[:-2]:  # Without ToTensor and Normalize.
            want = step(want)
        got = images.prepare(image, *setting)
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, np.asarray(want), err_msg=name)


def embeddings(spec, folder, tokenizer, mesh):
    """Our image and text embeddings, from the files alone."""
    towers = encode.Towers(spec, mesh, Settings(batch_size=4))
    loaded = encode.read(str(folder), None, eval_config(spec, folder), mesh)
    found = towers.images(loaded.vision, lambda i: photograph(PHOTOGRAPHS[i]), len(PHOTOGRAPHS))["pooled"]
    arrays = encode.tower("text", loaded.source, spec, mesh, 2**18)
    return found, towers.texts(arrays, tokenizer(TEXTS))


@pytest.mark.parametrize("spec", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_logits_on_photographs_equal_open_clips(spec, tmp_path):
    model = torch_model(spec)
    folder = write_model(tmp_path / "model", model)
    if spec is CLIP:
        theirs, tokenizer = open_clip.SimpleTokenizer(), open_tokenizer(spec.text, folder)
    else:
        siglip_folder = write_siglip_tokenizer(tmp_path)
        theirs = open_clip.tokenizer.HFTokenizer(str(siglip_folder), context_length=64, clean="canonicalize")
        tokenizer = open_tokenizer(spec.text, siglip_folder)
    ours, words = embeddings(spec, folder, tokenizer, sharding.make_mesh(eval_config(spec, folder).mesh))
    with torch.no_grad():
        pixels = torch.stack([transform(spec)(photograph(name)) for name in PHOTOGRAPHS])
        want_images, want_words = model.encode_image(pixels), model.encode_text(theirs(TEXTS))
        want, _ = model.get_logits(pixels, theirs(TEXTS))
    logits = np.exp(model.logit_scale.item()) * encode.unit(ours) @ encode.unit(words).T
    logits += 0 if model.logit_bias is None else model.logit_bias.item()
    for text, a, b in zip(TEXTS, words, want_words, strict=True):
        close(a, b, 1e-4, text)
    close(ours, want_images, 1e-4, "images")
    np.testing.assert_allclose(logits, want, rtol=0, atol=1e-3)
    assert np.ptp(want.numpy(), axis=0).min() > 0.05, "the photographs must not all look alike"
