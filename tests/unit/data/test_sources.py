"""Valid data paths: tars, patterns, folders, tfds, remote stores, the demo's photographs; errors for invalid ones."""

import importlib.util
import io
import os
import sys

import fsspec
import pytest
from helpers import refused
from records import encoded, noise, write_tar, write_tfds

from diva_jax import demo
from diva_jax.data import files
from diva_jax.data.sources import FolderSource, TfdsSource, open_source
from diva_jax.data.tars import TarSource


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in range(12):
        write_tar(folder / f"{i:05d}.tar", {f"{i}.jpg": noise(i), f"{i}.txt": b"caption"})
    return folder


def names(source):
    return [source.name(i) for i in range(len(source))]


def test_tars_by_file_folder_glob_and_braces(shards, monkeypatch):
    expected = [f"{i:05d}.tar/{i}.jpg" for i in range(12)]
    monkeypatch.setenv("HOME", str(shards.parent))
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
    for name in (*own[::-1], "../linked/4.gif", "a/._x.jpg", "b/notes.txt", "b/1.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode() if name[-1] not in "tn" else b"{}")
    os.symlink(root, root / "a" / "loop")
    os.symlink(tmp_path / "linked", root / "link")
    source = open_source(str(root))
    assert isinstance(source, FolderSource)
    want = [*((name, name.encode()) for name in own), ("link/4.gif", b"../linked/4.gif")]
    assert [source.read(i)[:2] for i in range(5)] == want and names(open_source(f"{root}/")) == names(source)
    os.rename(root, tmp_path / "plain")
    assert names(open_source(f"{tmp_path}/plain/b/*")) == [f"{tmp_path}/plain/b/{n}" for n in ("1.JPG", "2.png")]


def test_bad_paths_are_one_sentence(tmp_path, shards):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello " * 200)
    two = r"2 files that do not exist \(.*00012.tar, .*00013.tar\)"
    for path, complaint in (
        ("", "is not set"),
        (None, "is not set"),
        (f"{tmp_path}/nowhere", "does not exist"),
        (f"{tmp_path}/nowhere/*.tar", "matches no file"),
        (f"{shards}/{{00010..00013}}.tar", two),
        (f"{tmp_path}/empty", "neither .tar shards nor images"),
        (f"{tmp_path}/notes.txt", "notes.txt' is no kind of data"),
        ("nosuch://bucket/x", "cannot be reached"),
    ):
        assert "config.data.path" in refused(complaint, open_source, path) or "nosuch" in path


@pytest.fixture
def bucket():
    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/bucket", recursive=True)


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
    folder = open_source("memory://bucket/images")
    assert [folder.read(i)[1] for i in range(3)] == [noise(i) for i in range(3)]
    refused("does not exist", open_source, "memory://bucket/nothing")


def test_a_store_that_refuses(monkeypatch):
    class ConnectError(Exception):
        pass

    def offline(*_):
        raise ConnectError("name or service not known")

    monkeypatch.setattr(files, "is_folder", offline)
    says = "cannot be read .ConnectError: name or service not known.: check it, the netw"
    refused(says, open_source, "memory://bucket/a.tar")
    with pytest.raises(ConnectError):  # An error of this project, which is not to be hidden.
        open_source("a/b")
    monkeypatch.setattr(files, "is_folder", lambda _: (_ for _ in ()).throw(PermissionError("403 Forbidden")))
    refused("config.data.path='a.tar' cannot be read .403 Forbidden.: check it, the network", open_source, "a.tar")


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    def features(kinds):
        image = kinds.Image(shape=(None, None, 3))
        return {"image": image, "mask": image, "label": kinds.Text()}

    examples = [{"image": io.BytesIO(encoded(i)), "mask": io.BytesIO(encoded(100 + i)), "label": "x"} for i in range(5)]
    folder = tmp_path_factory.mktemp("tfds")
    write_tfds(folder, "Tagged", "train", features, examples)
    return folder


def test_tfds_without_tensorflow(tfds_dir):
    source = open_source(f"tfds:tagged/train?data_dir={tfds_dir}&image=image")
    assert isinstance(source, TfdsSource) and not source.has_text
    assert sorted(source.read(i)[1] for i in range(5)) == sorted(encoded(i) for i in range(5))
    assert source.name(3) == "tfds:tagged/train[3]"
    masks = open_source(f"tfds:tagged:1.0.0/train[:40%]?data_dir={tfds_dir}&image=mask&text=label")
    assert len(masks) == 2 and masks.read(0)[1] in [encoded(100 + i) for i in range(5)]
    assert masks.has_text and masks.read(0).text == "x" and masks.read(0, with_text=False).text is None
    assert "tensorflow" not in sys.modules
    for spec, complaint in (
        ("tfds:tagged", "must read tfds:name/split"),
        ("tfds:tagged/train?split=x", "must read tfds:name/split"),
        ("tfds:tagged/train?data_dir={dir}", r"2 image features \(image, mask\)"),
        ("tfds:tagged/train?data_dir={dir}&image=label", "no image feature 'label'"),
        ("tfds:tagged/train?data_dir={dir}&image=mask&text=words", "no feature 'words', only image, mask, label"),
        ("tfds:tagged/test?data_dir={dir}&image=mask", "cannot be read"),
        ("tfds:no_such_set/train?data_dir={dir}", "cannot be read"),
    ):
        assert "config.data.path" in refused(complaint, open_source, spec.format(dir=tfds_dir))


def test_without_scikit_image(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "skimage" else find(name))
    refused(r"pip install -e '.\[demo\]'", demo.pack_photos, tmp_path)
    assert not list(tmp_path.iterdir())
