"""The contents of a batch: crops, token ids, captions, texts that differ in one fact, draws of the jittered view."""

import dataclasses
import io
import json
import logging
import re

import jax
import numpy as np
import pytest
import trees
from helpers import failed, refused
from PIL import Image
from records import batches, encoded, letters, tags, take, text_of, write_shards, write_tar, write_tfds

from diva_jax.data import images, inputs, preprocess, sources
from diva_jax.data.inputs import Classes, Edits, Listed
from diva_jax.data.sources import Record

COUNT = 14


@pytest.fixture(scope="module")
def captioned(home):
    write_shards(home, COUNT, 7, caption=f"{{}}. of {COUNT}. end")
    return home


@dataclasses.dataclass
class Spy:
    seen: list
    shape, dtype, needs_text = (), np.dtype(np.int32), False

    def open(self, config):
        return lambda example: self.seen.append(example) or np.int32(0)


def tokens(length=12, choose=None):
    return inputs.Tokens(length, lambda: letters(length), choose)


def test_a_batch_has_the_declared_arrays_and_each_image_its_own_caption(captioned):
    wanted = {"large": inputs.Image(23), "small": inputs.Image(9), "caption": tokens(20)}
    for batch in take(batches(captioned, wanted, batch=6), 5):
        assert set(batch) == {*wanted, "row"}
        for name, i in wanted.items():
            assert batch[name].shape == (6, *i.shape) and batch[name].dtype == i.dtype
        assert [int(text_of(ids).split(".")[0]) for ids in batch["caption"]] == tags(batch["small"])
    assert [wanted[name].needs_text for name in wanted] == [False, False, True]


def test_crops_of_two_sizes_are_of_one_box(noisy):
    """Each is the same without the others, and depends only on (seed, position)."""
    both = batches(noisy, {"a": inputs.Image(31), "b": inputs.Image(17)})
    alone = batches(noisy, {"b": inputs.Image(17)})
    for _ in range(4):
        np.testing.assert_array_equal(next(both)["b"], next(alone)["b"])
    seen = []
    batch = next(batches(noisy, {"spy": Spy(seen), "a": inputs.Image(31)}, seed=5, batch=4, threads=0))
    for position, (example, pixels) in enumerate(zip(seen, batch["a"], strict=True)):
        rng = np.random.default_rng((5, position))
        assert example.box == images.sample_box(rng, *example.image.size, (0.9, 1.0), (3 / 4, 4 / 3))
        assert rng.random() == example.rng.random()  # The box is drawn first.
        np.testing.assert_array_equal(images.resized_crop(example.image, example.box, 31, "bicubic"), pixels)
        assert example.image.mode == "RGB" and example.text is None


def test_no_caption_is_broken_only_where_text_is_needed(tmp_path, caplog):
    members = {f"{i}.png": encoded(i) for i in range(COUNT)}
    members |= {f"{i}.txt": {1: b"\xff\xfe", 2: b" \n"}.get(i, b"words") for i in range(COUNT) if i % 4}
    write_tar(tmp_path / "a.tar", members)
    without = batches(tmp_path, {"image": inputs.Image(8)}, batch=COUNT, max_broken_share=0.6)
    assert sorted(tags(next(without)["image"])) == list(range(COUNT)) and not without.decoder.count
    both = batches(tmp_path, {"image": inputs.Image(8), "caption": tokens()}, batch=COUNT, max_broken_share=0.6)
    batch = next(both)
    broken = {0, 4, 8, 12, 1, 2}
    assert set(tags(batch["image"])) == set(range(COUNT)) - broken and both.decoder.count == len(broken)
    assert {text_of(ids) for ids in batch["caption"]} == {"words"}
    assert all(caplog.text.count(f"a.tar/{i}.png: ") == 1 for i in broken)
    assert "it has no caption" in caplog.text and "cannot be read ('utf-8' codec" in caplog.text
    failed("share=0.2", take, batches(tmp_path, {"t": tokens()}, batch=COUNT, max_broken_share=0.2), 3)


def test_prepared_images_are_those_of_an_evaluation(noisy):
    """Bit-identical, whatever the run's crop; 24 of 32 is the central crop after resizing to 32, as in torchvision."""
    cropped = inputs.Prepared(24, resize=32)
    wanted, seen = {"a": inputs.Prepared(23), "b": inputs.Prepared(17, "squash", "bilinear"), "c": cropped}, []
    batch = next(batches(noisy, wanted | {"spy": Spy(seen)}, seed=2, batch=9, threads=0))
    assert [batch[n].shape[1:] for n in wanted] == [wanted[n].shape for n in wanted]
    for i, image in enumerate(example.image for example in seen):
        np.testing.assert_array_equal(batch["a"][i], images.prepare(image, 23, "shortest", "bicubic"))
        np.testing.assert_array_equal(batch["b"][i], images.prepare(image, 17, "squash", "bilinear"))
        w, h = (int(32 * side / min(image.size)) for side in image.size)
        left, top = round((w - 24) / 2), round((h - 24) / 2)
        whole = np.asarray(image.resize((w, h), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(batch["c"][i], whole[top : top + 24, left : left + 24])


SENTENCES = {
    "A dog. It runs!  Does it? Yes": ["A dog.", "A dog. It runs!", "A dog. It runs!  Does it?", None],
    "One 3.5 m tree.": [None],
    "no end ": ["no end"],
    "Two.\nLines. ": ["Two.", "Two.\nLines."],
}


def test_first_sentences_and_an_input_that_fails(captioned):
    rng = np.random.default_rng(0)
    for text, sentences in SENTENCES.items():
        assert {inputs.first_sentences(text, rng) for _ in range(60)} == {text if s is None else s for s in sentences}
    with pytest.raises(ZeroDivisionError):
        next(batches(captioned, {"t": tokens(choose=lambda text, rng: 1 / 0)}))


def test_one_of_several_captions_is_drawn():
    """A list is several captions, a text is one with all of its lines, of which nothing is drawn."""
    said, tokenize = ["a red cup", "two dogs", " ", "one\nblue hat"], tokens(20).open(None)

    def drawn(value, seed):
        example = inputs.Example(None, sources.caption(value), None, np.random.default_rng(seed))
        return text_of(tokenize(example)), example.rng.random()

    assert {drawn(said, seed)[0] for seed in range(40)} == {"a red cup", "two dogs", "one blue hat"}
    for text, value in (("two lines", "two\n\nlines"), ("a cup", ["a cup", "\n"]), ("a cup", b"\xef\xbb\xbfa cup")):
        assert drawn(value, 3) == (text, np.random.default_rng(3).random())
    record = Record("", b"", sources.caption([*said, "nothing"]), tuple(GOOD[:2]))
    for kind, others in ((Edits(4, True), set()), (Listed(2, True), {"nothing"})):
        found = [kind(record, np.random.default_rng(seed)) for seed in range(60)]
        assert {n for _, n in found} == {"a red cup", "two dogs", "one blue hat"} | others
        assert others or all(texts[0] == n for texts, n in found)


def test_inputs_that_cannot_be_are_one_sentence(captioned, noisy):
    words = {"image": inputs.Image(8), "words": tokens()}
    for path, wanted, says in (
        (noisy, lambda: words, "config.data.path=.* has no captions, which the input 'words' needs: give tar"),
        (captioned, lambda: {"row": inputs.Image(8)}, "an input cannot be called 'row'"),
        (captioned, lambda: {"image": inputs.Image(0)}, "an image input of 0 pixels"),
        (captioned, lambda: {"t": inputs.Tokens(12, lambda: letters(11))}, "gives 11 ids per text, but the input has"),
        (captioned, lambda: {"p": inputs.Prepared(0)}, "0 pixels cannot be made"),
        (captioned, lambda: {"p": inputs.Prepared(24, resize=20)}, "24 pixels cannot be cropped from an image of 20"),
    ):
        refused(says, lambda path=path, wanted=wanted: batches(path, wanted()))


SIZE = 22


def test_draws_lie_in_their_ranges_and_depend_on_their_own_key():
    keys = jax.random.split(jax.random.key(3), 400)
    d = jax.device_get(jax.jit(preprocess.draw_jitter, static_argnums=1)(keys, SIZE))
    assert (np.sort(d.order, axis=1) == np.arange(4)).all() and len(np.unique(d.order, axis=0)) == 24
    assert (abs(d.factors[:, :3] - 1) <= 0.1).all() and (abs(d.factors[:, 3]) <= 0.05).all()
    assert np.std(d.factors[:, :3], axis=0).min() > 0.05 and np.std(d.factors[:, 3]) > 0.025
    top, left, height, width = d.crop.T
    assert (d.crop >= 0).all() and (top + height <= SIZE).all() and (left + width <= SIZE).all()
    area, ratio = height * width / SIZE**2, width / height
    assert area.min() > 0.85 and ratio.min() > 0.85 and ratio.max() < 1.18 and len(np.unique(d.crop, axis=0)) > 20
    assert 0.4 < d.hflip.mean() < 0.6 and 0.4 < d.vflip.mean() < 0.6
    some = jax.device_get(preprocess.draw_jitter(keys[7:9], SIZE))
    for ours, want in zip(some, d, strict=True):
        np.testing.assert_allclose(ours, want[7:9], rtol=1e-6)


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
    # The first is beyond what towers read; in the next two, letters match others of the lexicon without regard to case.
    for text in ("x " * 200 + "red", "a WH\u0130TE cat", "a \u017fmall cat", "a redder boldness, nothing more", None):
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


def test_what_is_no_list_of_texts_and_texts_that_are_one_to_a_tokenizer():
    for value in (*WRONG, [GOOD[:2]], json.dumps(GOOD[:1]), "[" * 10**5, 7, b"\xff[]"):
        with pytest.raises(ValueError):
            sources.listed(value)
    record = Record("", b"", None, ("a long text, one", "a long text, two", "b"))
    example = inputs.Example(None, None, None, np.random.default_rng((0, 1)), texts=record.texts)
    ids = inputs.Texts(4, 6, lambda: letters(6), Listed(4)).open(None)(example)
    assert ids.shape == (5, 6) and (ids[[1, 3]] == -1).all() and (ids[[0, 2, 4]] >= 0).all()


def write(folder, kind):
    """The records in each form of data; TEXTS[3] is no JSON in the first two, and none of this form in the others."""
    rows = [{"image": f"files/{i}.png", "caption": f"thing {i}", "texts": t} for i, t in enumerate(TEXTS)]
    metas = [b"{" if row["texts"] == "no JSON" else json.dumps(row).encode() for row in rows]
    members = {f"{i}.{e}": d for i in range(len(TEXTS)) for e, d in (("png", encoded(i)), ("json", metas[i]))}
    images, cells = [row["image"] for row in rows], [json.dumps(t) if isinstance(t, list | dict) else t for t in TEXTS]
    texts = [[str(x) for x in t] if isinstance(t, list) else t and [str(t)] for t in TEXTS]
    texts[7] = [""]
    if kind == "tfds":
        examples = [{"image": io.BytesIO(encoded(i)), "texts": t or []} for i, t in enumerate(texts)]
        kinds = lambda k: {"image": k.Image(shape=(None, None, 3)), "texts": k.Sequence(k.Text())}  # noqa: E731
        write_tfds(folder, "Texts", "train", kinds, examples)
        return f"tfds:texts/train?data_dir={folder}"
    files = {"a.tar": members, "a.jsonl": b"\n\n".join(metas), "a.csv": {"image": images, "texts": cells}}
    files |= {"a.parquet": {"image": images, "mine": texts}} | {f"files/{name}": d for name, d in members.items()}
    trees.change(folder, files)
    paths = {"folder": folder / "files", "parquet": f"mix:1={folder}/a.parquet?texts=mine"}
    return paths.get(kind, folder / f"a.{kind}")


@pytest.mark.parametrize("kind", ["folder", "tar", "csv", "jsonl", "parquet", "tfds"])
def test_records_without_texts_are_skipped_and_wrong_ones_named(tmp_path, kind, caplog):
    """In every form of data; both inputs see the same texts."""
    wanted = {n: inputs.Texts(3, m, lambda m=m: letters(m), Listed(3)) for n, m in (("texts", 30), ("conditions", 25))}
    wanted["image"] = inputs.Image(12)
    caplog.set_level(logging.WARNING)
    iterator = batches(write(tmp_path, kind), wanted, batch=len(TEXTS), max_broken_share=1.0)
    batch = next(iterator)
    seen = dict(zip(tags(batch["image"]), batch["texts"], strict=True))
    assert sorted(seen) == USABLE
    for number, (*found, neutral) in seen.items():
        there = [text_of(ids) for ids in found if ids[0] >= 0]
        assert there == [t for t in TEXTS[number] if t in there] and there[0] == TEXTS[number][0]
        assert len(there) == min(3, len(TEXTS[number])) and text_of(neutral) == "a photo of number"
    shorter = batch["conditions"]
    np.testing.assert_array_equal(batch["texts"][..., :25] * (shorter >= 0), np.maximum(shorter, 0))
    assert iterator.decoder.skipped >= 1 and iterator.decoder.count == len(TEXTS) - len(USABLE) - 1
    assert "skipped a broken image" in caplog.text and "without texts that differ" in caplog.text


def test_data_and_files_that_cannot_give_texts_are_refused_at_once(tmp_path):
    write_shards(tmp_path, 9, 9, caption="a dog")

    def opened(choice):
        return batches(tmp_path, {"texts": inputs.Texts(2, 9, lambda: letters(9), choice)})

    refused("not one of 9 records has a list `texts`", opened, Listed(2))
    refused("a word of the lexicon", opened, Edits(2))
    bad, own = ([], {}, [{"words": ["a"]}], [{"words": ["a ", "b"]}], [{"words": ["a", 2]}], [3]), tmp_path / "own.json"
    for content in ("[", *map(json.dumps, bad)):
        own.write_text(content)
        refused(r"own\.json", Edits, 2, lexicon=own)
        refused(r"own\.json", Classes.read, 2, False, str(own), "a {}")
    own.write_text('[{"words": ["dog", "cat"]}]')
    assert {text_of(t) for t in next(opened(Edits(2, lexicon=own)))["texts"][0]} == {"a dog", "a cat", "a"}
    own.write_text('{"n02": "dog", "n01": ["cat", "kitten"]}')
    assert Classes.read(2, False, str(own), "a {}").names == ("dog", "cat")
