"""Texts about an image that differ in one fact: where they come from, and records that have none or wrong ones."""

import json
import logging
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import refused
from records import batches, encoded, letters, tags, text_of, write_tar

from diva_jax.common.errors import UserError
from diva_jax.data import inputs, records
from diva_jax.data.inputs import Classes, Edits, Listed
from diva_jax.data.records import Record

LEXICON = json.loads(inputs.LEXICON.read_text())
# Good lists, none, and what is no list of texts, by record; the last records are good again.
GOOD = [f"a photo of number {i}" for i in range(70)]
TEXTS = [
    GOOD[:2],
    None,
    GOOD[2:6],
    "no JSON",
    GOOD[:1],
    ["a", ""],
    ["a", " a"],
    ["b", 3],
    GOOD,
    {"a": "b"},
    ["c" * 5000, "d"],
]
TEXTS += [GOOD[7:9]] * 3
USABLE = [0, 2, 11, 12, 13]


def captions():
    """Each word of the lexicon in a caption, with what may stand around it."""
    for group in LEXICON:
        for i, word in enumerate(group["words"]):
            article = "An" if word[0] in "aeiou" else "A"
            yield f"{article} {word} thing", f"{i} things ({word.upper()}), or so"


def test_an_edit_changes_one_word_and_the_neutral_text_has_none():
    edits = Edits(4)
    for texts in captions():
        for text in texts:
            for seed in range(3):
                found, neutral = edits(Record("", b"", text), np.random.default_rng(seed))
                assert found[0] == text and 2 <= len(set(found)) == len(found) <= 4
                assert all(re.sub(r"\W|\ban?\b", "", t.lower()) for t in found)
                assert neutral not in found and "  " not in neutral
        # "An old thing" and "A young thing", "A thing".
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", " ".join([*found, neutral]).lower())
    assert edits(Record("", b"", "a redder boldness, nothing more"), np.random.default_rng(0)) is None
    assert edits(Record("", b"", None), np.random.default_rng(0)) is None
    assert edits(Record("", b"", "x " * 200 + "red"), np.random.default_rng(0)) is None  # Beyond what towers read.
    found, neutral = edits(Record("", b"", "no word\nTwo dogs on\tgrass."), np.random.default_rng(0))
    assert found[0] == "Two dogs on\tgrass." and neutral == "dogs on\tgrass." and found[1][0].isupper()


def test_neutral_texts_and_choices():
    swapped = ("a red cube and a blue ball", "a blue cube and a red ball")
    assert inputs.common(swapped) == "a cube and a ball" and inputs.common(["a", "b"]) == ""
    rng = np.random.default_rng(0)
    record = Record("", b"", "both", tuple(GOOD[:9]))
    for _ in range(20):
        found, neutral = Listed(3)(record, rng)
        assert found[0] == GOOD[0] and found == sorted(found) and len(set(found)) == 3
        assert neutral == "a photo of number" and Listed(3, of_caption=True)(record, rng)[1] == "both"
    assert Listed(3, of_caption=True)(record._replace(text=" "), rng) is None
    found, neutral = Classes(2, names=("cat", "dog", "sea lion"), template="a {}, a photo")(Record("", b""), rng)
    assert len(found) == 2 and neutral == "a a photo"


@pytest.mark.parametrize("value", TEXTS[3:11] + [[GOOD[:2]], json.dumps(GOOD[:1]), "[" * 10**5, 7, b"\xff[]"], ids=str)
def test_what_is_no_list_of_texts_is_a_value_error(value):
    with pytest.raises(ValueError):
        records.listed(value)


def rows():
    return [{"image": f"{i}.png", "caption": f"thing {i}", "texts": t} for i, t in enumerate(TEXTS)]


def write(folder, kind):
    """The records in each form of data; TEXTS[3] is no JSON in the first two, and none of this form in the others."""
    for i in range(len(TEXTS)):
        (folder / f"{i}.png").write_bytes(encoded(i))
    metas = [b"{" if t == "no JSON" else json.dumps(row).encode() for t, row in zip(TEXTS, rows(), strict=True)]
    if kind == "folder":
        for i, meta in enumerate(metas):
            (folder / f"{i}.json").write_bytes(meta)
        return folder
    if kind == "tar":
        members = {}
        for i, meta in enumerate(metas):
            members |= {f"{i}.png": encoded(i), f"{i}.txt": b"a caption", f"{i}.json": meta}
        write_tar(folder / "a.tar", members)
        return folder / "a.tar"
    if kind == "csv":
        cells = ["" if t is None else json.dumps(t) if t != "no JSON" else t for t in TEXTS]
        lines = [f'{i}.png,"{cell.replace(chr(34), chr(34) * 2)}"' for i, cell in enumerate(cells)]
        (folder / "a.csv").write_text("\n".join(["image,texts", *lines]))
    elif kind == "jsonl":
        (folder / "a.jsonl").write_bytes(b"\n\n".join(metas) + b"\n")
    else:
        texts = [[str(x) for x in t] if isinstance(t, list) else t and [str(t)] for t in TEXTS]
        texts[7] = [""]
        table = pa.table({"image": [f"{i}.png" for i in range(len(TEXTS))], "mine": texts})
        pq.write_table(table, folder / "a.parquet")
        return f"mix:1={folder}/a.parquet?texts=mine"
    return folder / f"a.{kind}"


@pytest.mark.parametrize("kind", ["folder", "tar", "csv", "jsonl", "mix of parquet"])
def test_records_without_texts_are_skipped_and_wrong_ones_named(tmp_path, kind, caplog):
    """In every form of data; both inputs see the same texts."""
    wanted = {
        "image": inputs.Image(12),
        "texts": inputs.Texts(3, 30, lambda: letters(30), Listed(3)),
        "conditions": inputs.Texts(3, 25, lambda: letters(25), Listed(3)),
    }
    caplog.set_level(logging.WARNING)
    iterator = batches(write(tmp_path, kind), wanted, batch=len(TEXTS), max_broken_share=0.9)
    batch = next(iterator)
    seen = dict(zip(tags(batch["image"]), batch["texts"], strict=True))
    assert sorted(seen) == USABLE
    for number, (*found, neutral) in seen.items():
        there = [text_of(ids) for ids in found if ids[0] >= 0]
        assert there == [t for t in TEXTS[number] if t in there] and there[0] == TEXTS[number][0]
        assert len(there) == min(3, len(TEXTS[number])) and text_of(neutral) == "a photo of number"
    np.testing.assert_array_equal(
        batch["texts"][..., :25] * (batch["conditions"] >= 0), np.maximum(batch["conditions"], 0)
    )
    assert iterator.broken.skipped >= 1 and iterator.broken.count == len(TEXTS) - len(USABLE) - 1
    assert "skipped a broken image" in caplog.text and "without texts that differ" in caplog.text


def test_texts_that_are_one_to_a_tokenizer_are_left_out():
    record = Record("", b"", None, ("a long text, one", "a long text, two", "b"))
    example = inputs.Example(None, None, None, np.random.default_rng((0, 1)), texts=record.texts)
    ids = inputs.Texts(4, 6, lambda: letters(6), Listed(4)).open(None)(example)
    assert ids.shape == (5, 6) and (ids[[1, 3]] == -1).all() and (ids[[0, 2, 4]] >= 0).all()


def test_data_and_files_that_cannot_give_texts_are_refused_at_once(tmp_path):
    write_tar(
        tmp_path / "a.tar", {f"{i}.{e}": d for i in range(9) for e, d in (("png", encoded(i)), ("txt", b"a dog"))}
    )
    for choice, says in ((Listed(2), "not one of 9 records has a list `texts`"), (Edits(2), "a word of the lexicon")):
        with pytest.raises(UserError, match=says) as e:
            batches(tmp_path / "a.tar", {"texts": inputs.Texts(2, 9, lambda: letters(9), choice)})
        assert "\n" not in str(e.value)
    for content in (
        "[",
        "[]",
        "{}",
        '[{"words": ["one"]}]',
        '[{"words": ["a ", "b"]}]',
        '[{"words": ["a", 2]}]',
        "[3]",
    ):
        (tmp_path / "own.json").write_text(content)
        refused(r"own\.json", Edits, 2, lexicon=tmp_path / "own.json")
        refused(r"own\.json", Classes.read, 2, False, str(tmp_path / "own.json"), "a {}")
    (tmp_path / "own.json").write_text('[{"words": ["dog", "cat"]}]')
    own = Edits(2, lexicon=tmp_path / "own.json")
    batch = next(batches(tmp_path / "a.tar", {"texts": inputs.Texts(2, 9, lambda: letters(9), own)}))
    assert {text_of(t) for t in batch["texts"][0]} == {"a dog", "a cat", "a"}
