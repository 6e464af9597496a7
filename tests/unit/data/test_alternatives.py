"""Texts about an image that differ in one fact: where they come from, and records that have none or wrong ones."""

import csv
import json
import logging
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import refused
from records import batches, encoded, letters, tags, text_of, write_tar

from diva_jax.data import inputs, records
from diva_jax.data.inputs import Classes, Edits, Listed
from diva_jax.data.records import Record

LEXICON = json.loads(inputs.LEXICON.read_text())
# Good lists, none, and what is no list of texts, by record; the last records are good again.
GOOD = [f"a photo of number {i}" for i in range(70)]
WRONG = ["no JSON", GOOD[:1], ["a", ""], ["a", " a"], ["b", 3], GOOD, {"a": "b"}, ["c" * 5000, "d"]]
TEXTS = [GOOD[:2], None, GOOD[2:6], *WRONG, *[GOOD[7:9]] * 3]
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
    for text in ("a redder boldness, nothing more", None, "x " * 200 + "red"):  # The last is beyond what towers read.
        assert edits(Record("", b"", text), np.random.default_rng(0)) is None
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


def test_what_is_no_list_of_texts_is_a_value_error():
    for value in (*WRONG, [GOOD[:2]], json.dumps(GOOD[:1]), "[" * 10**5, 7, b"\xff[]"):
        with pytest.raises(ValueError):
            records.listed(value)


def write(folder, kind):
    """The records in each form of data; TEXTS[3] is no JSON in the first two, and none of this form in the others."""
    rows = [{"image": f"{i}.png", "caption": f"thing {i}", "texts": t} for i, t in enumerate(TEXTS)]
    metas = [b"{" if row["texts"] == "no JSON" else json.dumps(row).encode() for row in rows]
    members = {}
    for i, meta in enumerate(metas):
        members |= {f"{i}.png": encoded(i), f"{i}.txt": b"a caption", f"{i}.json": meta}
    write_tar(folder / "a.tar", members)
    if kind == "tar":
        return folder / "a.tar"
    (folder / "files").mkdir()
    for name, data in members.items():
        (folder / "files" / name).write_bytes(data)
    path = folder / "files" / f"a.{kind}"
    if kind == "csv":
        cells = [t if isinstance(t, str) else json.dumps(t) if t else "" for t in TEXTS]
        with open(path, "w", newline="") as f:
            csv.writer(f).writerows([("image", "texts"), *((f"{i}.png", cell) for i, cell in enumerate(cells))])
    elif kind == "jsonl":
        path.write_bytes(b"\n\n".join(metas) + b"\n")
    elif kind == "parquet":
        texts = [[str(x) for x in t] if isinstance(t, list) else t and [str(t)] for t in TEXTS]
        texts[7] = [""]
        pq.write_table(pa.table({"image": [row["image"] for row in rows], "mine": texts}), path)
        return f"mix:1={path}?texts=mine"
    return folder / "files" if kind == "folder" else path


@pytest.mark.parametrize("kind", ["folder", "tar", "csv", "jsonl", "parquet"])
def test_records_without_texts_are_skipped_and_wrong_ones_named(tmp_path, kind, caplog):
    """In every form of data; both inputs see the same texts."""
    wanted = {n: inputs.Texts(3, m, lambda m=m: letters(m), Listed(3)) for n, m in (("texts", 30), ("conditions", 25))}
    wanted["image"] = inputs.Image(12)
    caplog.set_level(logging.WARNING)
    iterator = batches(write(tmp_path, kind), wanted, batch=len(TEXTS), max_broken_share=0.9)
    batch = next(iterator)
    seen = dict(zip(tags(batch["image"]), batch["texts"], strict=True))
    assert sorted(seen) == USABLE
    for number, (*found, neutral) in seen.items():
        there = [text_of(ids) for ids in found if ids[0] >= 0]
        assert there == [t for t in TEXTS[number] if t in there] and there[0] == TEXTS[number][0]
        assert len(there) == min(3, len(TEXTS[number])) and text_of(neutral) == "a photo of number"
    shorter = batch["conditions"]
    np.testing.assert_array_equal(batch["texts"][..., :25] * (shorter >= 0), np.maximum(shorter, 0))
    assert iterator.broken.skipped >= 1 and iterator.broken.count == len(TEXTS) - len(USABLE) - 1
    assert "skipped a broken image" in caplog.text and "without texts that differ" in caplog.text


def test_texts_that_are_one_to_a_tokenizer_are_left_out():
    record = Record("", b"", None, ("a long text, one", "a long text, two", "b"))
    example = inputs.Example(None, None, None, np.random.default_rng((0, 1)), texts=record.texts)
    ids = inputs.Texts(4, 6, lambda: letters(6), Listed(4)).open(None)(example)
    assert ids.shape == (5, 6) and (ids[[1, 3]] == -1).all() and (ids[[0, 2, 4]] >= 0).all()


def test_data_and_files_that_cannot_give_texts_are_refused_at_once(tmp_path):
    members = {f"{i}.{e}": d for i in range(9) for e, d in (("png", encoded(i)), ("txt", b"a dog"))}
    write_tar(tmp_path / "a.tar", members)

    def opened(choice):
        return batches(tmp_path / "a.tar", {"texts": inputs.Texts(2, 9, lambda: letters(9), choice)})

    refused("not one of 9 records has a list `texts`", opened, Listed(2))
    refused("a word of the lexicon", opened, Edits(2))
    lists = ([], {}, [{"words": ["one"]}], [{"words": ["a ", "b"]}], [{"words": ["a", 2]}], [3])
    for content in ("[", *map(json.dumps, lists)):
        (tmp_path / "own.json").write_text(content)
        refused(r"own\.json", Edits, 2, lexicon=tmp_path / "own.json")
        refused(r"own\.json", Classes.read, 2, False, str(tmp_path / "own.json"), "a {}")
    (tmp_path / "own.json").write_text('[{"words": ["dog", "cat"]}]')
    batch = next(opened(Edits(2, lexicon=tmp_path / "own.json")))
    assert {text_of(t) for t in batch["texts"][0]} == {"a dog", "a cat", "a"}
