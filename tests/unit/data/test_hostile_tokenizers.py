"""Tokenizer files with changed fields and bytes: refused in one sentence, or ids that the text tower has."""

import gzip
import json

import numpy as np
import pytest
from mutations import changed, damaged

from diva_jax import demo
from diva_jax.common.errors import UserError
from diva_jax.data import tokenizers
from diva_jax.models.backbones import TextSpec
from diva_jax.weights import parts

pytestmark = pytest.mark.attack

TEXT = TextSpec(vocab_size=514, context_length=9)
TEXTS = ["a photo of a cat", "", "ünï " * 50, "\x00\x1b[31m", "<end_of_text>"]


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """Name -> bytes of each kind of file."""
    folder = tmp_path_factory.mktemp("tokenizer")
    demo.write_byte_tokenizer(folder)
    vocab = json.loads((folder / "vocab.json").read_text())
    words = {token: i for token, i in vocab.items() if i < 512}
    added = [{"id": i, "content": token} for token, i in vocab.items() if i >= 512]
    whole = {"added_tokens": added, "model": {"type": "BPE", "vocab": words, "merges": []}}
    return {
        "vocab.json": (folder / "vocab.json").read_bytes(),
        "merges.txt": b"#version: 0.2\n",
        "tokenizer.json": json.dumps(whole).encode(),
        "bpe_simple_vocab_16e6.txt.gz": gzip.compress(b"#version\na b\nc d</w>\n"),
        "tokenizer_config.json": json.dumps(
            {"tokenizer_class": "CLIPTokenizer", "pad_token": "!", "auto_map": {"AutoTokenizer": ["a--b", None]}}
        ).encode(),
    }


def variants(rng, name: str, data: bytes, count: int):
    for case in range(count):
        if name.endswith(".json") and case % 2:
            yield json.dumps(changed(rng, json.loads(data), 2)[0]).encode()
        else:
            yield damaged(rng, data)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json", "bpe_simple_vocab_16e6.txt.gz"])
@pytest.mark.parametrize("seed", range(3))
def test_files_of_clip(tmp_path, contents, name, seed):
    if name in ("vocab.json", "merges.txt"):
        for other in ("vocab.json", "merges.txt"):
            (tmp_path / other).write_bytes(contents[other])
    for data in variants(np.random.default_rng(seed), name, contents[name], 30):
        (tmp_path / name).write_bytes(data)
        try:
            ids = tokenizers.open_tokenizer(TEXT, tmp_path)(TEXTS)
        except UserError as e:
            assert "\n" not in str(e) and len(str(e)) < 1000
        else:
            assert ids.shape == (len(TEXTS), 9) and 0 <= ids.min() and ids.max() < TEXT.vocab_size


def test_files_that_unpack_to_much_more(tmp_path):
    (tmp_path / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(bytes(2**27), 1))
    with pytest.raises(UserError, match="more than 64 MiB"):
        tokenizers.open_tokenizer(TEXT, tmp_path)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_files_of_the_prompt(tmp_path, contents, name):
    """Through transformers, which must not run the code that `auto_map` names."""
    for other in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / other).write_bytes(contents[other])
    assert parts.diffusers_tokenizer(tmp_path, 6)(["a photo"]).shape == (1, 6)
    for data in variants(np.random.default_rng(0), name, contents[name], 8):
        (tmp_path / name).write_bytes(data)
        try:
            ids, mask = parts.diffusers_tokenizer(tmp_path, 6).encode(["a photo"])
        except UserError as e:
            assert str(tmp_path) in str(e) and "\n" not in str(e) and len(str(e)) < 1000
        else:
            assert ids.shape == mask.shape == (1, 6)
