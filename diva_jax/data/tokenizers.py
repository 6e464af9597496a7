"""Text to token ids for CLIP's, SigLIP's and MetaCLIP 2's text towers, from the files beside the weights."""

import gzip
import html
import io
import string
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import regex
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from diva_jax.common import json_files, paths
from diva_jax.common.errors import UserError, brief, explained
from diva_jax.models.backbones import TextSpec

Tokenizer = Callable[[Sequence[str]], np.ndarray]
# The letters that stand for the bytes 0 to 255 in byte-level vocabularies, in the order of OpenAI's; and the tokens of
# CLIP's vocabulary without merges, these letters within a word and at its end.
_LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTE_TOKENS = [*_LETTERS, *(letter + "</w>" for letter in _LETTERS)]

_START, _END = "<start_of_text>", "<end_of_text>"
# Names of the special tokens in transformers' vocabularies -> in open_clip's.
_SPECIAL = {"<|startoftext|>": _START, "<|endoftext|>": _END}
_WORDS = regex.compile(
    rf"{_START}|{_END}|'(?:s|t|re|ve|m|ll|d)|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+", flags=regex.IGNORECASE
)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_MAX_UNPACKED_BYTES = 2**26
_MAX_ID = 2**24
# Entries of OpenAI's merges file that make its vocabulary of 49,408.
_OPENAI_MERGES = 49152 - 256 - 2


def _basic_clean(text: str) -> str:
    """Fixes broken Unicode and resolves HTML entities, as CLIP's text cleaning does for every model."""
    import ftfy  # Here, because it takes 50 ms to import, and a run without texts does not need it.

    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def whitespace_clean(text: str) -> str:
    """open_clip's default for other tokenizers ("whitespace"): runs of whitespace become one blank, case is kept."""
    return " ".join(_basic_clean(text).split())


def siglip_clean(text: str) -> str:
    """SigLIP's ("canonicalize"): underscores become blanks, no ASCII punctuation, lower case, single blanks."""
    return " ".join(_basic_clean(text).replace("_", " ").translate(_NO_PUNCTUATION).lower().split())


class ClipTokenizer:
    """CLIP's lower-cased byte-level BPE with `size` ids, padded with zeros to `length`. `vocab` is token -> id, the
    special tokens under open_clip's or transformers' names; of `merges` the first was learned first. `added` tokens,
    such as "<cat-toy>", map to whether texts have them in lower case (transformers' `normalized`); others are found
    before a text is cleaned. A UserError where these do not fit each other."""

    def __init__(
        self, vocab: dict[str, int], merges: Sequence[tuple[str, str]], added: Mapping[str, bool], length: int
    ):
        vocab = {_SPECIAL.get(t, t): i for t, i in vocab.items()}
        if missing := [t for t in (_START, _END) if t not in vocab]:
            raise UserError(f"a CLIP tokenizer's vocabulary has no {missing[0]}: its files are not CLIP's")
        if not all(type(i) is int and 0 <= i < _MAX_ID for i in vocab.values()):
            raise UserError("a CLIP tokenizer's vocabulary does not map each token to an id: fetch its files again")
        self.size, self._length = max(vocab.values()) + 1, length
        # The library has no exception of its own.
        with explained("a CLIP tokenizer's files do not fit each other", "fetch them again", Exception):
            self._bpe = tokenizers.Tokenizer(models.BPE(vocab, list(merges), end_of_word_suffix="</w>"))
        self._bpe.add_special_tokens([_START, _END])
        added = {t.lower() if lower else t: lower for t, lower in added.items() if t not in _SPECIAL}
        self._bpe.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in added])
        longest = sorted(added, key=len, reverse=True)
        lower, exact = ([regex.escape(t) for t in longest if added[t] == kind] for kind in (True, False))
        self._words = regex.compile("|".join([*lower, _WORDS.pattern]), regex.IGNORECASE)
        self._exact = regex.compile(f"({'|'.join(exact)})") if exact else None
        self._bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._bpe.post_processor = processors.TemplateProcessing(
            single=f"{_START} $A {_END}", special_tokens=[(t, vocab[t]) for t in (_START, _END)]
        )
        self._bpe.enable_truncation(length)
        self._bpe.enable_padding(length=length, pad_id=0)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> ids, int32 [N, length]; a text that is too long is cut and still ends with the end token."""
        ids = []
        for text in texts:
            pieces = self._exact.split(text) if self._exact else [text]
            # The library's own rule for words has another version of Unicode than open_clip's, and an older one.
            words = []
            for i, piece in enumerate(pieces):  # Every second one is an added token.
                words += [piece] if i % 2 else self._words.findall(whitespace_clean(piece).lower())
            ids.append(self._bpe.encode(words, is_pretokenized=True).ids)
        return np.array(ids, np.int32).reshape(len(texts), self._length)


class FolderTokenizer:
    """A tokenizer of transformers with `size` ids on cleaned text, padded as the folder's files state: SigLIP's,
    MetaCLIP 2's. `kind` is transformers' name of its model, where they do not say it; a UserError for broken files."""

    def __init__(self, folder: Path, length: int, clean: Callable[[str], str] = str, kind: str | None = None):
        from transformers import AutoTokenizer

        self._length, self._clean = length, clean
        # transformers raises a different exception for each file that is missing or broken.
        with explained(f"the tokenizer files in {folder} cannot be read", "fetch the folder again", Exception):
            options = dict(local_files_only=True, trust_remote_code=False, tokenizer_type=kind)
            self._tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            self.size = max(self._tokenizer.get_vocab().values()) + 1
            self([""])  # Where the padding token is missing, this fails.

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> ids, int32 [N, length]; a text that is too long is cut and still ends with the end token."""
        return self.encode(texts)[0]

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(what `__call__` returns, bool [N, length]: false for padding)."""
        # Half of a pair of UTF-16, which JSON may hold, is a question mark.
        cleaned = [self._clean(text).encode("utf-8", "replace").decode() for text in texts]
        shape = (len(texts), self._length)
        encoded = self._tokenizer(
            cleaned, max_length=self._length, padding="max_length", truncation=True, return_attention_mask=True
        )
        ids, mask = np.asarray(encoded["input_ids"], np.int32), np.asarray(encoded["attention_mask"], bool)
        return ids.reshape(shape), mask.reshape(shape)


def _pair(merge: str | list[str]) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def clip_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]], dict[str, bool]]:
    """(token -> id, merges, added tokens as `ClipTokenizer` has them) from whichever of CLIP's files a folder has; a
    UserError where it has none, or one that is broken."""
    path, form = folder / "tokenizer.json", (dict[str, Any], "fetch it again")
    try:
        if path.exists():
            whole = json_files.read(path, *form)
            vocab, merges = whole["model"]["vocab"], [_pair(m) for m in whole["model"]["merges"]]
            listed = {t["id"]: t for t in whole.get("added_tokens", ())}
        elif (path := folder / "vocab.json").exists():
            vocab = json_files.read(path, *form)
            path = folder / "merges.txt"
            lines = json_files.read_bytes(path).decode("utf-8").split("\n")
            merges = [_pair(line) for line in lines if line and not line.startswith("#version")]
            path = folder / "added_tokens.json"  # Older versions of transformers wrote it.
            older = json_files.read(path, *form, {})
            listed = {i: {"content": token, "normalized": True} for token, i in older.items()}
            path = folder / "tokenizer_config.json"
            listed |= {int(i): t for i, t in json_files.read(path, *form, {}).get("added_tokens_decoder", {}).items()}
        else:
            path = folder / "bpe_simple_vocab_16e6.txt.gz"
            with gzip.open(io.BytesIO(json_files.read_bytes(path))) as f:
                content = f.read(_MAX_UNPACKED_BYTES + 1)
            if len(content) > _MAX_UNPACKED_BYTES:
                raise ValueError("it has more than 64 MiB")
            merges, listed = [_pair(line) for line in content.decode("utf-8").split("\n")[1 : _OPENAI_MERGES + 1]], {}
            vocab = {t: i for i, t in enumerate([*BYTE_TOKENS, *(a + b for a, b in merges), _START, _END])}
        added = {t["content"]: bool(t.get("normalized", not t.get("special"))) for t in listed.values()}
        return vocab | {t["content"]: i for i, t in listed.items()}, merges, added
    except (UserError, OSError, EOFError, KeyError, TypeError, ValueError, AttributeError, zlib.error) as e:
        raise UserError(f"{path} is no tokenizer file of CLIP's ({brief(e, 300)}): fetch it again") from e


# Kind of a tokenizer that is read by transformers -> how its texts are cleaned.
_CLEAN = {"siglip": siglip_clean, "xlm": whitespace_clean}
# Files of which a folder needs one, and how a message names them: of CLIP's own tokenizer, and of transformers'.
_CLIP_FILES = ("tokenizer.json", "vocab.json", "bpe_simple_vocab_16e6.txt.gz")
_CLIP_NEEDS = "tokenizer.json, vocab.json with merges.txt, or bpe_simple_vocab_16e6.txt.gz"
_FOLDER_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
_FOLDER_NEEDS = "tokenizer.json or spiece.model, with tokenizer_config.json"


def open_tokenizer(text: TextSpec, folder: str | Path, field: str = "") -> Tokenizer:
    """The tokenizer of a text tower, texts -> int32 [N, context_length], from the files in a folder, which the config's
    `field` may name. A UserError says which are missing or broken, or that the vocabulary is larger than the tower's.
    """
    folder, kind = paths.expanded(folder), text.tokenizer
    needed, files = (_CLIP_NEEDS, _CLIP_FILES) if kind == "clip" else (_FOLDER_NEEDS, _FOLDER_FILES)
    if not any((folder / name).exists() for name in files):
        instead = f" or set --{field}=FOLDER" if field else ""
        raise UserError(f"{folder} has no tokenizer: it needs {needed}; put them there{instead}")
    if kind == "clip":
        tokenizer = ClipTokenizer(*clip_vocabulary(folder), text.context_length)
    else:
        tokenizer = FolderTokenizer(folder, text.context_length, _CLEAN[kind])
    if tokenizer.size > text.vocab_size:
        problem = f"the tokenizer in {folder} has {tokenizer.size} tokens"
        raise UserError(f"{problem}, but the text tower only {text.vocab_size}")
    return tokenizer
