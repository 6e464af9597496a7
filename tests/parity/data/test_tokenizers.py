"""Tokenizers against open_clip's, for every set of files that a folder of weights may contain."""

import json
import shutil

import numpy as np
import open_clip
import pytest
from eval_data import TEXTS
from eval_models import write_siglip_tokenizer
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from transformers import CLIPTokenizer

from diva_jax.common.errors import UserError
from diva_jax.data import tokenizers
from diva_jax.models.backbones import TextSpec

CLIP = TextSpec()
SIGLIP = TextSpec(context_length=64, vocab_size=32000, tokenizer="siglip")


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
    tokenizers_of = [tokenizers.open_tokenizer(CLIP, folder) for folder in clip_folders]
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
    ours = tokenizers.open_tokenizer(SIGLIP, siglip_folder)(texts)
    reference = HFTokenizer(str(siglip_folder), context_length=64, clean="canonicalize")
    np.testing.assert_array_equal(ours, reference(texts).numpy())
    # Padded with the end token; a text without letters has only padding.
    assert (ours[3] == 1).all() and (ours[5] == 1).all() and ours[11, -1] == 1 and (ours[11, :-1] != 1).all()


XLM = TextSpec(context_length=64, vocab_size=32000, tokenizer="xlm")


def test_siglip2_and_metaclip2_equal_open_clip(tmp_path):
    """A Gemma tokenizer on canonicalised text, and XLM-V's on text whose case is kept."""
    for kind, text, clean in (("gemma", SIGLIP, "canonicalize"), ("xlm", XLM, "whitespace")):
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
        (CLIP, {}, "has no tokenizer: it needs tokenizer.json, vocab.json with merges.txt"),
        (CLIP, {"vocab.json": "{}"}, "merges.txt is missing"),
        (CLIP, {"vocab.json": "{", "merges.txt": ""}, "vocab.json is no tokenizer file"),
        (CLIP, {"vocab.json": '{"a": 0}', "merges.txt": "a b\n"}, "no <start_of_text>"),
        (CLIP, {"tokenizer.json": '{"model": {}}'}, "tokenizer.json is no tokenizer file"),
        (CLIP, {"bpe_simple_vocab_16e6.txt.gz": "not gzip"}, "bpe_simple_vocab_16e6.txt.gz is no tokenizer file"),
        (SIGLIP, {}, "it needs tokenizer.json or spiece.model"),
        (SIGLIP, {"spiece.model": "broken"}, "cannot be read"),
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
