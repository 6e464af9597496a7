"""Data paths: tars, patterns, folders, tables, Hugging Face datasets, tfds, remote stores; errors for invalid ones."""

import concurrent.futures
import importlib.util
import io
import itertools
import json
import logging
import os
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import trees
from helpers import refused
from records import batches, encoded, noise, tags, write_tar, write_tfds

from diva_jax import demo
from diva_jax.data import files, inputs, labelled, tables
from diva_jax.data.sources import FolderSource, TfdsSource, open_source
from diva_jax.data.tars import TarSource


def names(source):
    return [source.name(i) for i in range(len(source))]


def test_tars_by_file_folder_glob_and_braces(tmp_path, monkeypatch):
    tars = {f"{i:05d}.tar": {f"{i}.jpg": noise(i), f"{i}.txt": "caption"} for i in range(12)}
    trees.change(shards := tmp_path / "shards", tars)
    expected = [f"{i:05d}.tar/{i}.jpg" for i in range(12)]
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (shards, "~/shards", f"{shards}/*.tar", f"{shards}/{{00000..00011}}.tar"):
        assert names(open_source(str(path))) == expected
    assert names(open_source(f"{shards}/0000[2-4].tar")) == expected[2:5]
    assert names(open_source(f"{shards}/{{00003,00001}}.tar")) == [expected[3], expected[1]]
    one = open_source(f"{shards}/00007.tar")
    assert isinstance(one, TarSource) and one.read(0)[:2] == ("00007.tar/7.jpg", noise(7))


def test_image_folder_is_recursive_and_sorted(tmp_path):
    """Links to folders are followed, each folder once; the name of a folder may look like a pattern."""
    root = tmp_path / "cc3m[train]{v2}"
    own = ("0.jpeg", "a/c/3.webp", "b/1.JPG", "b/2.png")
    others = dict.fromkeys(("b/notes.txt", "b/1.json"), b"{}")
    trees.change(root, {n: n.encode() for n in (*own[::-1], "../linked/4.gif", "a/._x.jpg")} | others)
    os.symlink(root, root / "a" / "loop")
    os.symlink(tmp_path / "linked", root / "link")
    source = open_source(str(root))
    assert isinstance(source, FolderSource)
    want = [*((name, name.encode()) for name in own), ("link/4.gif", b"../linked/4.gif")]
    assert [source.read(i)[:2] for i in range(5)] == want and names(open_source(f"{root}/")) == names(source)
    with mock.patch("os.scandir", side_effect=PermissionError(13, "Permission denied", "b")):
        refused(r"the folder b cannot be read \(Permission denied\): make it readable", open_source, str(root))
    os.rename(root, tmp_path / "plain")
    assert names(open_source(f"{tmp_path}/plain/b/*")) == [f"{tmp_path}/plain/b/{n}" for n in ("1.JPG", "2.png")]


HIDDEN = (".Trash-1000/files/0.jpg", "a/.thumbnails/1.png", "a/@eaDir/2.jpg/SYNOFILE.jpg", "a/._3.jpg")


@pytest.mark.parametrize("root", ("home", ".cache/home"))
def test_hidden_folders_hold_no_data(tmp_path, bucket, root):
    """But the path itself may be below one, or ask for them."""
    trees.change(tmp_path / root, dict.fromkeys((*HIDDEN, "a/4.jpg"), "PNG"))
    for name in (*HIDDEN, "a/4.jpg"):
        bucket.pipe(f"/bucket/{root}/{name}", encoded(0))
    for base, end in itertools.product((tmp_path / root, f"memory://bucket/{root}"), ("", "/a", "/**/*.jpg", "/*/?.*")):
        assert [Path(n).name for n in names(open_source(f"{base}{end}"))] == ["4.jpg"], end
        assert len(open_source(f"{base}/.Trash-*/files/*")) == len(open_source(f"{base}/a/.thumbnails")) == 1
    assert list(labelled.class_folders(tmp_path / root).folders) == ["a"]


def test_remote_tars_folder_and_cache(bucket):
    for i in range(3):
        data = io.BytesIO()
        write_tar(None, {f"{i}.jpg": noise(i), f"{i}.txt": b"x"}, fileobj=data)
        bucket.pipe(f"/bucket/tars/{i:05d}.tar", data.getvalue())
        bucket.pipe(f"/bucket/images/{i}.jpg", noise(i))
    expected = [(f"{i:05d}.tar/{i}.jpg", noise(i)) for i in range(3)]
    for pattern in ("", "/*.tar", "/{00000..00002}.tar") * 2:  # The second time from the cache.
        source = open_source(f"memory://bucket/tars{pattern}", cache_dir="memory://bucket/cache")
        assert [source.read(i)[:2] for i in range(3)] == expected
    assert bucket.glob("/bucket/cache/*.npz")
    assert [open_source("memory://bucket/images").read(i)[1] for i in range(3)] == [noise(i) for i in range(3)]
    refused("does not exist", open_source, "memory://bucket/nothing")


def test_a_store_that_refuses(monkeypatch):
    class ConnectError(Exception):
        pass

    offline = mock.Mock(side_effect=ConnectError("name or service not known"))
    monkeypatch.setattr(files, "is_folder", offline)
    says = "cannot be read .ConnectError: name or service not known.: check it, the netw"
    refused(says, open_source, "memory://bucket/a.tar")
    with pytest.raises(ConnectError):  # An error of this project, which is not to be hidden.
        open_source("a/b")
    offline.side_effect = PermissionError("403 Forbidden")
    refused("config.data.path='a.tar' cannot be read .*403 Forbidden.: check it, the network", open_source, "a.tar")


def test_tfds_without_tensorflow(tmp_path):
    def features(kinds):
        image = kinds.Image(shape=(None, None, 3))
        return {"image": image, "mask": image, "label": kinds.Text()}

    examples = [{"image": io.BytesIO(encoded(i)), "mask": io.BytesIO(encoded(100 + i)), "label": "x"} for i in range(5)]
    write_tfds(tmp_path, "Tagged", "train", features, examples)
    source = open_source(f"tfds:tagged/train?data_dir={tmp_path}&image=image")
    assert isinstance(source, TfdsSource) and not source.has_text
    assert sorted(source.read(i)[1] for i in range(5)) == sorted(encoded(i) for i in range(5))
    assert source.name(3) == "tfds:tagged/train[3]"
    masks = open_source(f"tfds:tagged:1.0.0/train[:40%]?data_dir={tmp_path}&image=mask&text=label")
    assert len(masks) == 2 and masks.read(0)[1] in [encoded(100 + i) for i in range(5)]
    assert masks.has_text and masks.read(0).text == "x" and masks.read(0, with_text=False).text is None
    assert "tensorflow" not in sys.modules
    for spec, complaint in (
        ("tfds:tagged/train?data_dir={dir}", r"2 image features \(image, mask\)"),
        ("tfds:tagged/train?data_dir={dir}&image=label", "no image feature 'label'"),
        ("tfds:tagged/train?data_dir={dir}&image=mask&text=words", "no feature 'words', only image, mask, label"),
        ("tfds:tagged/test?data_dir={dir}&image=mask", "the split cannot be read .Unknown split .*: name a split"),
        ("tfds:no_such_set/train?data_dir={dir}", "cannot be read .*: prepare it first .* or name its folder"),
    ):
        assert "config.data.path" in refused(complaint, open_source, spec.format(dir=tmp_path))


@pytest.mark.parametrize("given, lacks", ((None, "has_text, __len__, name, read: "), ([], "has_text, name, read: ")))
def test_a_module_that_opens_no_source(monkeypatch, given, lacks):
    monkeypatch.setitem(sys.modules, "mine", mock.Mock(__file__="mine.py", open_source=lambda options: given))
    refused(f"the module mine opens nothing with {lacks}give module:NAME", open_source, "module:mine?a=1")


def test_without_scikit_image(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "skimage" else find(name))
    refused(r"pip install -e '.\[demo\]'", demo.pack_photos, tmp_path)
    assert not list(tmp_path.iterdir())


COUNT = 23
CAPTIONS = [f'caption {i}, "quoted"\nand on two lines' if i % 5 == 0 else f"caption {i}" for i in range(COUNT)]
HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture
def folder(tmp_path):
    trees.change(tmp_path, dict(zip(PATHS, IMAGES, strict=True)))
    return tmp_path


def where(i):
    return f"{i}.png" if i % 3 else f"more/{i}.png"


def hf(images, captions=CAPTIONS, name="image", text="text"):
    structs = pa.array([{"bytes": data, "path": None} for data in images], HF_IMAGE)
    return {"id": range(len(images)), name: structs, text: captions}


def on_disk(columns):
    """What `save_to_disk` writes, with a file that `datasets` leaves in the folder."""
    names, middle = [f"data-{k:05d}-of-00002.arrow" for k in (0, 1)], (COUNT + 1) // 2
    parts = [{name: values[part] for name, values in columns.items()} for part in (slice(middle), slice(middle, None))]
    tree = dict(zip(names, parts, strict=True)) | {"cache-1234.arrow": {"indices": [1]}, "dataset_info.json": "{}"}
    tree["state.json"] = {"_data_files": [{"filename": n} for n in names]}
    return {f"saved/{name}": content for name, content in tree.items()}


PATHS, IMAGES = [where(i) for i in range(COUNT)], [encoded(i) for i in range(COUNT)]
CELLS = [path if i % 2 else {"path": path} for i, path in enumerate(PATHS)]
ROWS = [json.dumps({"id": i, "path": CELLS[i], "text": CAPTIONS[i]}) for i in range(COUNT)]
# The same 23 records in each form.
FORMS = {
    "csv": {"a.csv": {"image": PATHS, "caption": CAPTIONS}},
    "tsv": {"a.tsv": {"title": CAPTIONS, "filepath": PATHS}},
    "jsonl": {"a.jsonl": "\n\n".join(ROWS)},
    "parquet of paths": {"a.parquet": {"path": PATHS, "caption": CAPTIONS}},
    "parquet of bytes": {"a.parquet": {"text": CAPTIONS, "jpg": IMAGES}},
    "parquet folder": {
        "hf/data/train-00000-of-00002.parquet": hf(IMAGES[:9], CAPTIONS[:9]),
        "hf/data/train-00001-of-00002.parquet": hf(IMAGES[9:], CAPTIONS[9:]),
    },
    "save_to_disk": on_disk(hf(IMAGES)),
}


def make(folder, tree):
    """Writes files; returns the path of the first one, or of its folder."""
    trees.change(folder, tree)
    return folder / next(iter(tree)).partition("/")[0]


@pytest.mark.parametrize("kind", FORMS)
def test_every_form_holds_the_same_records(folder, kind):
    source = open_source(str(make(folder, FORMS[kind])))
    assert len(source) == COUNT and source.has_text
    records = [source.read(i) for i in range(COUNT)]
    assert [r.image for r in records] == [encoded(i) for i in range(COUNT)]
    assert [r.text for r in records] == [" ".join(c.split("\n")) for c in CAPTIONS]  # One caption each.
    assert source.read(3, with_text=False).text is None
    names = [r.name for r in records]
    assert names == [source.name(i) for i in range(COUNT)] and len(set(names)) == COUNT
    order = list(np.random.default_rng(0).integers(0, COUNT, 200))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, order)) == [records[i] for i in order]


def test_rows_are_named_and_columns_chosen_by_option(folder):
    source = open_source(str(make(folder, FORMS["csv"])))
    # The caption of every fifth row takes two lines, of which the last counts.
    assert [source.name(i) for i in range(7)] == [f"a.csv, line {n}" for n in (3, 4, 5, 6, 7, 9, 10)]
    rows = open_source(str(make(folder, FORMS["parquet folder"])))
    assert rows.name(0) == "train-00000-of-00002.parquet, row 1"
    assert rows.name(COUNT - 1) == "train-00001-of-00002.parquet, row 14"
    make(folder, {"00000.parquet": {"url": ["x"]}})  # As img2dataset does, beside each shard.
    assert len(open_source(str(folder))) == COUNT
    others = {"image": PATHS[1:] + PATHS[:1], "caption": ["wrong"] * COUNT, "the file": PATHS, "words": CAPTIONS}
    source = open_source(f"{make(folder, {'b.csv': others})}?image=the file&text=words")
    assert source.read(4)[1:3] == (encoded(4), CAPTIONS[4])
    columns = hf(IMAGES, name="photograph", text="words")
    for tree in ({"b.parquet": columns}, on_disk(columns)):
        source = open_source(f"{(path := make(folder, tree))}?image=photograph")
        assert not source.has_text and source.read(4).text is None
        assert open_source(f"{path}?text=words&image=photograph").read(4)[1:3] == (encoded(4), CAPTIONS[4])
    struct = pa.array([{"bytes": None, "path": where(3)}, {"bytes": encoded(1), "path": "1.jpg"}], HF_IMAGE)
    path = make(folder, {"a.parquet": {"image": struct, "words": [["one", "two"], ["three"]]}})
    source = open_source(str(path))
    assert [source.read(i).image for i in range(2)] == [encoded(3), encoded(1)] and not source.has_text
    assert open_source(f"{path}?text=words").read(0).text == "one\ntwo"  # A list of captions is lines.


@pytest.mark.parametrize("kind", ("csv", "parquet", "save_to_disk"))
def test_broken_rows_are_skipped_and_named(folder, kind, caplog):
    """Rows 3, 5 and 7: without an image, with a broken one, without a caption."""
    says, paths = ("no image", "it is no image of JPEG, ", "no caption"), list(PATHS)
    images = [None if i == 3 else b"broken" if i == 5 else image for i, image in enumerate(IMAGES)]
    captions = [None if i == 7 else c.partition("\n")[0] for i, c in enumerate(CAPTIONS)]
    if kind == "csv":
        paths[3], paths[5], says = "none.png", "", ("none.png", "no image", "no caption")
        path, names = make(folder, {"a.csv": {"image": paths, "caption": captions}}), "a.csv, line {}"
    elif kind == "save_to_disk":
        path, names = make(folder, on_disk(hf(images, captions))), "data-00000-of-00002.arrow, row {}"
    else:
        path, names = make(folder, {"a.parquet": {"image": images, "text": captions}}), "a.parquet, row {}"
    names = [names.format(row + (kind == "csv")) for row in (4, 6, 8)]
    ids = inputs.Tokens(1, lambda: lambda texts: np.zeros((len(texts), 1), np.int32))
    with caplog.at_level(logging.WARNING):
        batch = next(batches(path, {"image": inputs.Image(8), "ids": ids}, batch=COUNT, max_broken_share=0.5))
    assert set(tags(batch["image"])) == set(range(COUNT)) - {3, 5, 7}
    lines = [r.getMessage() for r in caplog.records]
    for name, why in zip(names, says, strict=True):
        assert sum(f"broken image: {name}: " in line and why in line for line in lines) == 1, (name, lines)


def test_large_row_groups_are_told_or_refused(folder, tmp_path, monkeypatch, caplog):
    path = make(folder, FORMS["parquet of bytes"])
    open_source(str(path))
    monkeypatch.setattr(tables, "_LARGE_ROW_GROUP_BYTES", 10)
    open_source(str(path))
    assert "a.parquet has row groups of up to 0 MB" in caplog.text
    monkeypatch.setattr(tables, "_MAX_ROW_GROUP_BYTES", 2**20)
    for rows in (30, 300):  # Of one value that is stored once and used by each row.
        pq.write_table(pa.table({"image": [bytes(2**13 + 1)] * rows}), path)
        assert path.stat().st_size < 2**15
        source = open_source(str(path))
        if rows == 30:
            assert source.read(29).image == bytes(2**13 + 1)
        else:
            refused("a.parquet has a row group of more than 1 MB, .*row_group_size=1000", source.read, 0)


# Value of config.data.path, files, and what the sentence has; "$" is the folder of the files.
REFUSED = json.loads(Path(__file__).with_name("refused.json").read_text())


@pytest.mark.parametrize("path, files, says", REFUSED, ids=[str(case[0])[:40] for case in REFUSED])
def test_what_is_no_data_is_refused_in_one_sentence(tmp_path, path, files, says):
    trees.change(tmp_path, files)
    began = time.monotonic()
    refused(says, open_source, path and path.replace("$", str(tmp_path)))
    assert time.monotonic() - began < 20
