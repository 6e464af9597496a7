"""A word-level vocabulary in the files of CLIP's tokenizer: byte pairs are merged until each word is one token."""

import functools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diva_jax.data import tokenizers


def merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """The merges of byte-pair encoding, most frequent pair first, after which every word is one token."""
    parts = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    found = []
    while pairs := Counter(pair for p in parts.values() for pair in zip(p, p[1:], strict=False)):
        first, second = max(sorted(pairs), key=pairs.__getitem__)
        found.append((first, second))
        for word, p in parts.items():
            out = []
            for symbol in p:
                if out and (out[-1], symbol) == (first, second):
                    out[-1] += symbol
                else:
                    out.append(symbol)
            parts[word] = out
    return found


def tokens(words: Sequence[str]) -> dict[str, int]:
    """Token -> id: all bytes, bytes that end a word, the results of `merges`, start and end."""
    joined = [a + b for a, b in merges(words)]
    names = [*tokenizers.BYTE_TOKENS, *joined, "<|startoftext|>", "<|endoftext|>"]
    return {name: i for i, name in enumerate(names)}


def write(folder: Path, words: Sequence[str], length: int) -> None:
    """Writes the files that CLIP's tokenizer has in transformers.

    Args:
      folder: the folder; it is created if it does not exist.
      words: lower-case words.
      length: tokens of a text at most.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(tokens(words), ensure_ascii=False, indent=1), "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges(words))]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    special = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token="!")
    about = dict(tokenizer_class="CLIPTokenizer", model_max_length=length, **special)
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=1))


def remembering(tokenize: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer; it keeps the ids of each text, since the world has few texts."""
    one = functools.lru_cache(2**15)(lambda text: tokenize([text])[0])
    return lambda texts: np.stack([one(text) for text in texts])
