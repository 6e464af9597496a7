"""Tokenizers, image transforms and logits against open_clip's."""

import json
import shutil

import numpy as np
import open_clip
import pytest
from eval_data import PHOTOGRAPHS, TEXTS, photograph
from eval_models import write_siglip_tokenizer
from open_clip.pretrained import get_pretrained_cfg
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from PIL import Image
from transformers import CLIPTokenizer

from diva_jax.common.errors import UserError
from diva_jax.data import images, tokenizers
from diva_jax.models.backbones import TABLE, TextSpec

CLIP_TEXT = TextSpec()
SIGLIP_TEXT = TextSpec(context_length=64, vocab_size=32000, tokenizer="siglip")


# Letters, marks, blanks and symbols from all over Unicode, with the share of each range.
RANGES = {
    (32, 127): 0.55,
    (0xA0, 0x250): 0.1,
    (0x300, 0x370): 0.05,
    (0x370, 0x530): 0.1,
    (0x1E00, 0x2070): 0.1,
    (0x1F300, 0x1F650): 0.1,
}
PIECES = ("&amp;", "&#x301;", "&lt;", "'s", "'LL", "'ſ", " \u3000", "\x85", "<end_of_text>", "<START_OF_TEXT>", "Ã©")


def random_texts(count: int, seed: int) -> list[str]:
    """Strings of up to 120 characters, some of them with entities, contractions and special tokens."""
    rng = np.random.default_rng(seed)
    ranges, shares = list(RANGES), list(RANGES.values())
    out = []
    for _ in range(count):
        drawn = rng.choice(len(ranges), rng.integers(0, 120), p=shares)
        letters = [chr(rng.integers(*ranges[k])) for k in drawn]
        for k in rng.integers(0, len(PIECES), rng.integers(0, 4)):
            letters.insert(rng.integers(len(letters) + 1), PIECES[k])
        out.append("".join(letters))
    return out


@pytest.fixture(scope="module")
def clip_folders(tmp_path_factory):
    """A folder with each form of OpenAI's vocabulary."""
    merged, pair, whole = (tmp_path_factory.mktemp(name) for name in ("merges", "pair", "whole"))
    shutil.copy(open_clip.tokenizer.default_bpe(), merged / "bpe_simple_vocab_16e6.txt.gz")
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
    texts = TEXTS + random_texts(4000, seed=1)
    want = SimpleTokenizer()(texts).numpy()
    ours = tokenizers_of[0](texts)
    assert ours.dtype == np.int32 and tokenizers_of[0]([]).shape == (0, 77)
    np.testing.assert_array_equal(ours, want)
    for other in tokenizers_of[1:]:
        np.testing.assert_array_equal(other(texts[:200]), want[:200])
    # Long texts are truncated and end with the end token.
    assert (ours[TEXTS.index("word " * 200)] != 0).all() and ours[11, -1] == ours.max() == 49407


@pytest.fixture(scope="module", params=["timm", "transformers"])
def siglip_folder(request, tmp_path_factory):
    return write_siglip_tokenizer(tmp_path_factory.mktemp(request.param), request.param)


def test_siglip_equals_open_clip(siglip_folder):
    texts = TEXTS + random_texts(200, seed=2)
    ours = tokenizers.open_tokenizer(SIGLIP_TEXT, siglip_folder)(texts)
    reference = HFTokenizer(str(siglip_folder), context_length=64, clean="canonicalize")
    np.testing.assert_array_equal(ours, reference(texts).numpy())
    # Padded with the end token; a text without letters has only padding.
    assert (ours[3] == 1).all() and (ours[5] == 1).all() and ours[11, -1] == 1 and (ours[11, :-1] != 1).all()


XLM = TextSpec(context_length=64, vocab_size=32000, tokenizer="xlm")


def test_siglip2_and_metaclip2_equal_open_clip(tmp_path):
    """A Gemma tokenizer on canonicalised text, and XLM-V's on text whose case is kept."""
    for kind, text, clean in (("gemma", SIGLIP_TEXT, "canonicalize"), ("xlm", XLM, "whitespace")):
        folder = write_siglip_tokenizer(tmp_path / kind, kind)
        texts = TEXTS + random_texts(100, seed=3)
        reference = HFTokenizer(str(folder), context_length=64, clean=clean)(texts).numpy()
        ours = tokenizers.open_tokenizer(text, folder)(texts)
        np.testing.assert_array_equal(ours, reference)
    cased = tokenizers.open_tokenizer(XLM, folder)
    assert cased(["A Dog"]).tolist() != cased(["a dog"]).tolist()


@pytest.mark.parametrize(
    "text, files, says",
    [
        (CLIP_TEXT, {}, "has no tokenizer: it needs tokenizer.json, vocab.json with merges.txt"),
        (CLIP_TEXT, {"vocab.json": "{}"}, "merges.txt is missing"),
        (CLIP_TEXT, {"vocab.json": "{", "merges.txt": ""}, "vocab.json is no tokenizer file"),
        (CLIP_TEXT, {"vocab.json": '{"a": 0}', "merges.txt": "a b\n"}, "no <start_of_text>"),
        (CLIP_TEXT, {"tokenizer.json": '{"model": {}}'}, "tokenizer.json is no tokenizer file"),
        (
            CLIP_TEXT,
            {"bpe_simple_vocab_16e6.txt.gz": "not gzip"},
            "bpe_simple_vocab_16e6.txt.gz is no tokenizer file",
        ),
        (SIGLIP_TEXT, {}, "it needs tokenizer.json or spiece.model"),
        (SIGLIP_TEXT, {"spiece.model": "broken"}, "cannot be read"),
        (TextSpec(tokenizer="bert"), {}, "text.tokenizer='bert' is not known"),
    ],
)
def test_missing_and_broken_files_are_named(tmp_path, text, files, says):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=says):
        tokenizers.open_tokenizer(text, tmp_path)


def test_a_vocabulary_larger_than_the_tower_is_refused(tmp_path):
    shutil.copy(open_clip.tokenizer.default_bpe(), tmp_path / "bpe_simple_vocab_16e6.txt.gz")
    with pytest.raises(UserError, match="49408 tokens, but the text tower only 100"):
        tokenizers.open_tokenizer(TextSpec(vocab_size=100), tmp_path)


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
