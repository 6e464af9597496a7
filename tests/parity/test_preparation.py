"""Tokenizers, decoding, crops and views against open_clip, Pillow, torchvision, PyTorch and kornia's formula."""

import io
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from eval_data import PHOTOGRAPHS, TEXTS, encoded, photograph
from helpers import close, refused
from open_clip.pretrained import get_pretrained_cfg
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, default_bpe
from PIL import Image
from places import TESTS
from torch_models import write_siglip_tokenizer
from torchvision.transforms import InterpolationMode, RandomResizedCrop, functional as TF
from transformers import CLIPTokenizer

from diva_jax.data import images, preprocess, tokenizers
from diva_jax.demo import examples
from diva_jax.models.backbones import OPENAI_MEAN, TABLE, TextSpec

BPE = "bpe_simple_vocab_16e6.txt.gz"
CLIP_TEXT = TextSpec()
SIGLIP_TEXT = TextSpec(context_length=64, vocab_size=32000, tokenizer="siglip")


# Letters, marks, blanks and symbols from all over Unicode, with the share of each range.
RANGES = {(32, 127): 0.55, (0xA0, 0x250): 0.1, (0x300, 0x370): 0.05, (0x370, 0x530): 0.1, (0x1E00, 0x2070): 0.1}
RANGES[0x1F300, 0x1F650] = 0.1
PIECES = ("&amp;", "&#x301;", "&lt;", "'s", "'LL", "'ſ", " \u3000", "\x85", "<end_of_text>", "<START_OF_TEXT>", "Ã©")


def random_texts(count: int, seed: int) -> list[str]:
    """Strings of up to 120 characters, some of them with entities, contractions and special tokens."""
    rng = np.random.default_rng(seed)
    ranges, shares = list(RANGES), list(RANGES.values())
    out = []
    for _ in range(count):
        letters = [chr(rng.integers(*ranges[k])) for k in rng.choice(len(ranges), rng.integers(0, 120), p=shares)]
        for k in rng.integers(0, len(PIECES), rng.integers(0, 4)):
            letters.insert(rng.integers(len(letters) + 1), PIECES[k])
        out.append("".join(letters))
    return out


@pytest.fixture(scope="module")
def clip_folders(tmp_path_factory):
    """A folder with each form of OpenAI's vocabulary."""
    merged, pair, whole = (tmp_path_factory.mktemp(name) for name in ("merges", "pair", "whole"))
    shutil.copy(default_bpe(), merged / BPE)
    reference = SimpleTokenizer()
    theirs = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {theirs.get(t, t): i for t, i in reference.encoder.items()}
    merges = sorted(reference.bpe_ranks, key=reference.bpe_ranks.get)
    (pair / "vocab.json").write_text(json.dumps(vocab))
    (pair / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    CLIPTokenizer.from_pretrained(pair).save_pretrained(whole)
    assert (whole / "tokenizer.json").exists() and not (whole / "vocab.json").exists()
    return merged, pair, whole


def test_clip_equals_open_clip(clip_folders):
    tokenizers_of = [tokenizers.open_tokenizer(CLIP_TEXT, folder) for folder in clip_folders]
    texts = TEXTS + random_texts(1500, seed=1)
    want = SimpleTokenizer()(texts).numpy()
    ours = tokenizers_of[0](texts)
    assert ours.dtype == np.int32 and tokenizers_of[0]([]).shape == (0, 77)
    np.testing.assert_array_equal(ours, want)
    for other in tokenizers_of[1:]:
        np.testing.assert_array_equal(other(texts[:200]), want[:200])
    # Long texts are truncated and end with the end token.
    assert (ours[TEXTS.index("word " * 200)] != 0).all() and ours[11, -1] == ours.max() == 49407


XLM = TextSpec(context_length=64, vocab_size=32000, tokenizer="xlm")
# SigLIP 2's Gemma tokenizer is on canonicalised text, XLM-V's on text whose case is kept.
KINDS = dict.fromkeys(("timm", "transformers", "gemma"), (SIGLIP_TEXT, "canonicalize")) | {"xlm": (XLM, "whitespace")}


@pytest.mark.parametrize("kind", KINDS)
def test_siglip_and_metaclip2_equal_open_clip(tmp_path, kind):
    (text, clean), texts = KINDS[kind], TEXTS + random_texts(200, seed=2)
    write_siglip_tokenizer(tmp_path, kind)
    tokenize = tokenizers.open_tokenizer(text, tmp_path)
    ours = tokenize(texts)
    np.testing.assert_array_equal(ours, HFTokenizer(str(tmp_path), context_length=64, clean=clean)(texts).numpy())
    if kind in ("timm", "transformers"):  # Padded with the end token; a text without letters has only padding.
        assert (ours[3] == 1).all() and (ours[5] == 1).all() and ours[11, -1] == 1 and (ours[11, :-1] != 1).all()
    assert (tokenize(["A Dog"]).tolist() == tokenize(["a dog"]).tolist()) == (kind != "xlm")


@pytest.mark.parametrize("text, files, says", json.loads((TESTS / "parity/refused.json").read_text())["tokenizer"])
def test_missing_and_broken_files_are_named(tmp_path, text, files, says):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode() if content else Path(default_bpe()).read_bytes())
    refused(says, tokenizers.open_tokenizer, TextSpec(**text), tmp_path)


OF = {"vitl14": "openai", "metaclip": "metaclip_fullcc", "dfn": "dfn5b", "siglip": "webli"}


def example_images() -> dict[str, Image.Image]:
    """Photographs, every mode that is not RGB, sizes that round to either side, small and thin ones."""
    by_name = {name: photograph(name) for name in PHOTOGRAPHS}
    rgb = by_name["chelsea"]
    by_name |= {mode: rgb.convert(mode) for mode in ("P", "LA", "RGBA", "1", "CMYK")}
    by_name["alpha"] = rgb.convert("RGBA")
    by_name["alpha"].putalpha(Image.linear_gradient("L").resize(rgb.size))
    sizes = ((5, 9), (301, 37), (37, 512), (224, 224), (225, 224), (224, 227), (333, 334), (450, 449))
    return by_name | {f"{w}x{h}": rgb.resize((w, h)) for w, h in sizes}


@pytest.mark.parametrize("tag", TABLE)
def test_preparation_is_the_published_one(tag):
    spec = TABLE[tag]
    published = get_pretrained_cfg(spec.open_clip_name, OF[tag.split("_")[0]])
    mode = {"bicubic": spec.interpolation, "shortest": "shortest", "squash": "squash"}
    assert spec.mean == tuple(published["mean"]) and spec.std == tuple(published["std"])
    assert spec.resize_mode == mode[published.get("resize_mode", "shortest")]
    assert spec.interpolation == published.get("interpolation", "bicubic")


SETTINGS = {(s.image_size, s.resize_mode, s.interpolation) for s in TABLE.values()} | {(65, "shortest", "bilinear")}


@pytest.mark.parametrize("setting", sorted(SETTINGS))
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


SCALE, RATIO = (0.9, 1.0), (3 / 4, 4 / 3)


@pytest.fixture(scope="module")
def photographs():
    found = [Image.open(io.BytesIO(jpeg)).convert("RGB") for _, _, jpeg in examples(16)]
    return [*found, found[0].resize((61, 47)), found[1].convert("L").convert("RGB").resize((700, 333))]


@pytest.mark.parametrize("name", ["bicubic", "bilinear", "lanczos"])
def test_bit_for_bit_torchvision(photographs, name):
    rng = np.random.default_rng(1)
    for i, image in enumerate(photographs):
        w, h = image.size
        boxes = [images.sample_box(rng, w, h, SCALE, RATIO), images.sample_box(rng, w, h, (0.05, 0.4), RATIO)]
        for box in [*boxes, (0, 0, w, h), (w - 17, h - 13, w, h)]:
            left, top, right, bottom = box
            size = (64, 224, 512)[i % 3]
            mode = InterpolationMode(name)
            expected = TF.resized_crop(image, top, left, bottom - top, right - left, [size, size], mode)
            ours = images.resized_crop(image, box, size, name)
            assert ours.dtype == np.uint8 and ours.shape == (size, size, 3)
            np.testing.assert_array_equal(ours, np.asarray(expected))


# Attempts often fail in the first: a ratio of 4:3 fits only narrow boxes at this scale; in the fourth always. Twice the
# area of the image never fits: the box is the central one.
BOXES = [(500, 375, SCALE, RATIO), (301, 303, SCALE, RATIO), (640, 427, (0.08, 1.0), RATIO), (90, 1000, SCALE, RATIO)]
BOXES += [(90, 1000, (2.0, 2.0), RATIO), (1000, 90, (2.0, 2.0), RATIO), (100, 101, (2.0, 2.0), (0.2, 0.3))]


@pytest.mark.parametrize("width, height, scale, ratio", BOXES)
def test_boxes_are_distributed_as_torchvisions(width, height, scale, ratio):
    rng, count, image = np.random.default_rng(0), 3 if scale[0] > 1 else 4000, Image.new("RGB", (width, height))
    boxes = np.array([images.sample_box(rng, width, height, scale, ratio) for _ in range(count)])
    ours = np.stack([boxes[:, 1], boxes[:, 0], boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]], axis=1)
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)])
    if scale[0] > 1:
        np.testing.assert_array_equal(ours, theirs)
        return
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()
    h, w = ours[:, 2].astype(float), ours[:, 3].astype(float)
    assert (w / h).min() > ratio[0] * 0.98 and (w / h).max() < ratio[1] * 1.02

    def measures(b):
        return b[:, 0], b[:, 1], b[:, 2] * b[:, 3] / (width * height), np.log(b[:, 3] / b[:, 2])

    for a, b in zip(measures(ours), measures(theirs), strict=True):
        error = np.sqrt((a.var() + b.var()) / count)  # Of the difference of the means.
        assert abs(a.mean() - b.mean()) <= 4 * error + 1e-12 and abs(a.std() - b.std()) <= 0.08 * b.std() + 1e-12
        assert abs(np.quantile(a, 0.05) - np.quantile(b, 0.05)) <= 0.15 * b.std() + 1e-12


MODES = {"JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "RGBA", "LA", "L", "P", "1", "I;16"), "WEBP": ("RGB", "RGBA")}


@pytest.mark.parametrize("form, mode", [(form, mode) for form, modes in MODES.items() for mode in modes])
def test_decode_is_pillows_convert(photographs, form, mode):
    """In full: Pillow's draft mode would decode a large JPEG at half the resolution for a small crop."""
    large = photographs[3].resize((1024, 768))
    image = large.convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    elif "A" in mode:
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    stored, found = Image.open(io.BytesIO(data := encoded(image, form))), images.decode(data)
    assert stored.mode == mode and found.mode == "RGB"
    # Pillow's own conversion of 16 bits clips instead of scaling.
    want = large.convert("L") if mode == "I;16" else stored
    np.testing.assert_array_equal(np.asarray(found), np.asarray(want.convert("RGB")))


def test_broken_images_raise(photographs):
    """What is no image, cut off, or has a header of 60,000 x 60,000 pixels."""
    png, jpeg = (encoded(photographs[-2], form) for form in ("PNG", "JPEG"))
    huge = png[:16] + (60000).to_bytes(4, "big") * 2 + png[24:]
    other = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    for data in (b"", b"<html>403 Forbidden</html>", huge, jpeg[: len(jpeg) // 2], png[:-30], other):
        with pytest.raises((OSError, ValueError, SyntaxError, Image.DecompressionBombError)):
            images.decode(data)


# Up and down, odd sizes, not square.
SHAPES = [(64, 64, 28), (60, 60, 42), (42, 42, 60), (37, 53, 28), (51, 34, 48), (512, 512, 224)]


def by_torch(call, x, *args, **kw):
    """A function of PyTorch or torchvision, whose images are channels first, of ours."""
    return call(torch.tensor(np.asarray(x)).permute(0, 3, 1, 2), *args, **kw).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("h, w, size", SHAPES)
@pytest.mark.parametrize("mode", ["faithful", "exact"])
def test_backbone_view_is_torch_interpolate(h, w, size, mode):
    x, mean, std = np.random.default_rng(0).random((2, h, w, 3)).astype(np.float32), OPENAI_MEAN, (0.2, 0.3, 0.25)
    if mode == "faithful":
        expected = by_torch(F.interpolate, by_torch(TF.normalize, x, mean, std), (size, size), mode="bilinear")
    else:
        resized = by_torch(F.interpolate, x, (size, size), mode="bicubic", antialias=True)
        expected = by_torch(TF.normalize, resized, mean, std)
    ours = jax.jit(lambda x: preprocess.backbone_view(x, size, mean, std, mode))(x)
    assert ours.dtype == jnp.float32
    # Both compute positions in float32: among 512 pixels they are rounded by 7e-6 pixels (root mean square), and the
    # image changes by at most half of itself from pixel to pixel.
    close(ours, expected, 4e-6)


def kornia_resize(x: torch.Tensor, size: int) -> torch.Tensor:
    """kornia.geometry.resize(x, size, "bicubic", align_corners=True, antialias=True) of square images, smaller ones."""
    sigma = max((x.shape[-1] / size - 1) / 2, 0.001)
    taps = int(max(4 * sigma, 3))
    taps += taps % 2 == 0
    blurred = TF.gaussian_blur(x, taps, sigma)  # Reflected at the edges.
    return F.interpolate(blurred, (size, size), mode="bicubic", align_corners=True)


@pytest.mark.parametrize("n, size", [(24, 21), (50, 14), (17, 30)])
def test_aligned_resize(n, size):
    x = np.random.default_rng(n).uniform(size=(2, n, n, 3)).astype(np.float32)
    larger = by_torch(F.interpolate, x, (size, size), mode="bicubic", align_corners=True)
    want = by_torch(kornia_resize, x, size) if size < n else larger
    close(preprocess.aligned_resize(jnp.asarray(x), size), want, 2e-6)
