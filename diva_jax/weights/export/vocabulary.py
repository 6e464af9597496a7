"""The tokenizer of an export: all of its files, or none and a note that says so.

Where a folder of a CLIP model has no vocabulary, transformers makes a tokenizer of two or three tokens, without a
warning. open_clip reads the files with transformers, except for OpenAI's vocabulary, which it has built in.
"""

import dataclasses
import shutil
from pathlib import Path

from diva_jax.common.errors import UserError
from diva_jax.data import tokenizers
from diva_jax.models.backbones import Spec
from diva_jax.models.backbones.shared.open_clip_config import to_open_clip
from diva_jax.weights import writers
from diva_jax.weights.origins import ClipSource
from diva_jax.weights.places import TOKENIZER_FILES

# Kind of tokenizer -> sets of files, each of which suffices for transformers.
_SUFFICIENT = {
    "clip": ({"tokenizer.json"}, {"vocab.json", "merges.txt"}),
    "siglip": ({"tokenizer.json"}, {"spiece.model"}),
    "xlm": ({"tokenizer.json"}, {"sentencepiece.bpe.model"}),
}
# transformers raises an error for this class where there is no tokenizer.json.
_NONE = {"tokenizer_class": "PreTrainedTokenizerFast"}
_CLIP = {"tokenizer_class": "CLIPTokenizer"}


def _lacks(spec: Spec, files: set[str]) -> str:
    """What transformers needs beside these files, as a sentence's end; empty where they suffice."""
    sets = _SUFFICIENT[spec.text.tokenizer]
    if any(wanted <= files for wanted in sets):
        return ""
    return " or ".join(" with ".join(sorted(wanted, reverse=True)) for wanted in sets)


def add(source: ClipSource, spec: Spec, folder: str) -> ClipSource:
    """A source with the tokenizer's files of a folder; a UserError where that has none that fits the text tower."""
    if not spec.has_text:
        raise UserError("--tokenizer is for models with a text tower: leave it out, this one has none")
    where = Path(folder).expanduser()
    if lacks := _lacks(spec, {f.name for f in where.glob("*")}):
        raise UserError(f"--tokenizer={folder} has no tokenizer for transformers: it needs {lacks}")
    tokenizers.open_tokenizer(spec.text, where)
    return dataclasses.replace(source, tokenizer=tuple(where / f for f in TOKENIZER_FILES if (where / f).is_file()))


def tokenizer(source: ClipSource, spec: Spec) -> tokenizers.Tokenizer | None:
    """The tokenizer of a source, as the text tower is evaluated with it, or None; a UserError where its files are
    broken, or it has more tokens than the text tower.
    """
    if not spec.has_text or _lacks(spec, {f.name for f in source.tokenizer}):
        return None
    return tokenizers.open_tokenizer(spec.text, source.tokenizer[0].parent)


def note(source: ClipSource, spec: Spec, fmt: str) -> str:
    """One sentence for the screen and the card where an export is without a tokenizer; otherwise empty."""
    built_in = fmt == "open_clip" and "hf_tokenizer_name" not in to_open_clip(spec)["model_cfg"]["text_cfg"]
    if fmt == "pt" or built_in or not spec.has_text or not (lacks := _lacks(spec, {f.name for f in source.tokenizer})):
        return ""
    return (
        f"the export has no tokenizer, since {source.where} has none for transformers ({lacks}): encode texts with "
        "the tokenizer of the original model, or export again with --tokenizer=FOLDER"
    )


def write(folder: Path, source: ClipSource, spec: Spec, fmt: str) -> None:
    """Copies the tokenizer's files, or writes a config with which transformers refuses to make a tokenizer."""
    if note(source, spec, fmt):
        writers.write_json(folder / "tokenizer_config.json", _NONE)
        return
    for file in source.tokenizer:
        shutil.copyfile(file, folder / file.name)
    about = folder / "tokenizer_config.json"
    if fmt == "open_clip" and source.tokenizer and spec.text.tokenizer == "clip" and not about.exists():
        writers.write_json(about, _CLIP)  # An open_clip folder has no config.json that names the class.
