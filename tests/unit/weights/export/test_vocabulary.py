"""The tokenizer of an export for transformers: whole, or refused by AutoTokenizer and named on screen and card."""

import dataclasses
import shutil

import pytest
from specs import CLIP_FOLDER
from transformers import AutoTokenizer

from diva_jax import demo
from diva_jax.common.errors import UserError
from diva_jax.models.backbones import NO_TEXT
from diva_jax.weights import hf, writers
from diva_jax.weights.export import cards, vocabulary
from diva_jax.weights.origins import ClipSource
from diva_jax.weights.places import TOKENIZER_FILES
from diva_jax.weights.tensors import Tensors

SPEC = dataclasses.replace(CLIP_FOLDER, text=dataclasses.replace(CLIP_FOLDER.text, vocab_size=600))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    demo.write_byte_tokenizer(folder)
    return folder


def source_of(folder, *names) -> ClipSource:
    files = tuple(folder / n for n in (names or TOKENIZER_FILES) if (folder / n).exists())
    return ClipSource("runs/a", "checkpoint", Tensors({}, []), SPEC, tokenizer=files)


def exported(tmp_path, source):
    writers.write_json(tmp_path / "config.json", hf.to_transformers(SPEC, "float32"))
    vocabulary.write(tmp_path, source, SPEC, "hf")
    return tmp_path


def test_a_whole_tokenizer_is_copied(tmp_path, whole):
    source = source_of(whole)
    assert vocabulary.note(source, SPEC, "hf") == ""
    ids = AutoTokenizer.from_pretrained(exported(tmp_path, source))(["a dog"])["input_ids"][0]
    assert len(ids) == 6 and len(set(ids)) == 6


@pytest.mark.parametrize("names", [("vocab.json",), ("merges.txt",), ("none",)])
def test_what_is_not_whole_is_refused_and_named(tmp_path, whole, names):
    """Not written in part, from which transformers makes a tokenizer that knows no word."""
    source = source_of(whole, *names)
    folder = exported(tmp_path, source)
    assert not (folder / "vocab.json").exists()
    with pytest.raises(ValueError):
        AutoTokenizer.from_pretrained(folder)
    note = vocabulary.note(source, SPEC, "hf")
    assert "vocab.json with merges.txt" in note and "--tokenizer=FOLDER" in note
    assert note in cards.card(source, SPEC, "hf", "float32", note=note)
    added = vocabulary.add(source, SPEC, str(whole))
    assert vocabulary.note(added, SPEC, "hf") == "" and {f.name for f in added.tokenizer} >= {"vocab.json"}


def test_who_needs_none(whole):
    """A vision tower alone, a model without text, and open_clip with OpenAI's vocabulary, which it has."""
    source = source_of(whole, "none")
    assert vocabulary.note(source, SPEC, "pt") == ""
    assert vocabulary.note(source, dataclasses.replace(SPEC, text=NO_TEXT), "hf") == ""
    assert "--tokenizer=FOLDER" in vocabulary.note(source, SPEC, "open_clip")
    openai = dataclasses.replace(SPEC, text=dataclasses.replace(SPEC.text, vocab_size=49408))
    assert vocabulary.note(source, openai, "open_clip") == "" != vocabulary.note(source, openai, "hf")


def test_bad_folders_of_a_tokenizer(tmp_path, whole):
    source = source_of(whole, "none")
    shutil.copy(whole / "vocab.json", tmp_path)
    for folder, spec, named in (
        (tmp_path, SPEC, "it needs tokenizer.json or vocab.json with merges.txt"),
        (tmp_path / "nowhere", SPEC, "--tokenizer="),
        (whole, dataclasses.replace(SPEC, text=NO_TEXT), "leave it out"),
        (whole, CLIP_FOLDER, "514 tokens"),
    ):
        with pytest.raises(UserError, match=named):
            vocabulary.add(source, spec, str(folder))
