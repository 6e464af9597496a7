"""The tokenizer of an export: all of its files, or none and a note that says so.

Where a folder of a CLIP model has no vocabulary, transformers makes a tokenizer of two or three tokens, without a
warning, which maps every word to its unknown token.
"""

import dataclasses
from pathlib import Path

from diva_jax.common.errors import UserError
from diva_jax.data import tokenizers
from diva_jax.models.backbones import Spec
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


def _lacks(spec: Spec, files: set[str]) -> str:
    """What transformers needs beside these files, as a sentence's end; empty where they suffice."""
    sets = _SUFFICIENT[spec.text.tokenizer]
    if any(wanted <= files for wanted in sets):
        return ""
    return " or ".join(" with ".join(sorted(wanted, reverse=True)) for wanted in sets)


def add(source: ClipSource, spec: Spec, folder: str) -> ClipSource:
    """A source with the tokenizer's files of a folder in place of its own.

    Args:
      source: the weights.
      spec: their backbone.
      folder: with a tokenizer of the text tower.

    Raises:
      UserError: the backbone has no text tower, or the folder has no tokenizer that fits it.
    """
    if not spec.has_text:
        raise UserError("--tokenizer is for models with a text tower: leave it out, this one has none")
    where = Path(folder).expanduser()
    if lacks := _lacks(spec, {f.name for f in where.glob("*")}):
        raise UserError(f"--tokenizer={folder} has no tokenizer for transformers: it needs {lacks}")
    tokenizers.open_tokenizer(spec.text, where)
    return dataclasses.replace(source, tokenizer=tuple(where / f for f in TOKENIZER_FILES if (where / f).is_file()))


def note(source: ClipSource, spec: Spec, fmt: str) -> str:
    """One sentence for the screen and the card where an export is without a tokenizer; otherwise empty."""
    if fmt != "hf" or not spec.has_text or not (lacks := _lacks(spec, {f.name for f in source.tokenizer})):
        return ""
    return (
        f"the export has no tokenizer, since {source.where} has none for transformers ({lacks}): encode texts with "
        "the tokenizer of the original model, or export again with --tokenizer=FOLDER"
    )


def write(folder: Path, source: ClipSource, spec: Spec) -> None:
    """Copies the tokenizer's files, or writes a config with which transformers refuses to make a tokenizer."""
    if note(source, spec, "hf"):
        writers.write_json(folder / "tokenizer_config.json", _NONE)
    else:
        writers.copy_into(folder, source.tokenizer)
