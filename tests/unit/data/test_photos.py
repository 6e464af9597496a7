"""The data of the demo: photographs in the format of img2dataset."""

import hashlib
import importlib.util
import json
import tarfile

import numpy as np
import pytest

from diva_jax.common.errors import UserError
from diva_jax.data import images, photos
from diva_jax.data.sources import open_source


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    return folder, photos.pack_photos(folder)


def test_layout_of_img2dataset(packed):
    folder, shards = packed
    assert [p.name for p in shards] == ["00000.tar", "00001.tar", "00002.tar"]
    keys, total = [], 0
    for number, shard in enumerate(shards):
        with tarfile.open(shard) as tar:
            members = tar.getmembers()
            for jpg, meta, txt in zip(members[::3], members[1::3], members[2::3], strict=True):
                key = jpg.name.removesuffix(".jpg")
                assert (meta.name, txt.name) == (f"{key}.json", f"{key}.txt")
                assert len(key) == 9 and int(key) == number * 10_000 + len(keys) % 32
                facts, data = json.load(tar.extractfile(meta)), tar.extractfile(jpg).read()
                assert facts["caption"] == tar.extractfile(txt).read().decode()
                assert facts["key"] == key and facts["status"] == "success"
                assert facts["sha256"] == hashlib.sha256(data).hexdigest()
                assert (facts["width"], facts["height"]) == images.decode(data).size
                keys.append(key)
        stats = json.loads((folder / f"{number:05d}_stats.json").read_text())
        assert stats["successes"] == 32
        total += shard.stat().st_size
    assert len(keys) == len(set(keys)) == 96
    assert total < 5e6


def test_examples_are_distinct_varied_photographs(packed):
    source = open_source(str(packed[0]))
    found = [images.decode(source.read(i).image) for i in range(len(source))]
    assert len({image.tobytes() for image in found}) == 96
    assert all(96 <= min(i.size) and max(i.size) <= 640 for i in found)
    aspects = [i.width / i.height for i in found]
    assert min(aspects) < 0.8 and max(aspects) > 1.25
    assert all(np.asarray(i).std() > 5 for i in found)  # No region is blank.


def test_the_same_bytes_again(packed, tmp_path):
    again = photos.pack_photos(tmp_path)
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in packed[1]]
    other = photos.pack_photos(tmp_path / "other", count=32, seed=1)
    assert other[0].read_bytes() != again[0].read_bytes()


def test_folder_has_the_same_images(packed, tmp_path):
    photos.write_folder(tmp_path, count=32)
    folder, tars = open_source(str(tmp_path)), open_source(str(packed[1][0]))
    assert {folder.read(i)[1] for i in range(len(folder))} == {tars.read(i)[1] for i in range(len(tars))}


def test_without_scikit_image(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "skimage" else find(name))
    with pytest.raises(UserError, match=r"pip install 'diva_jax\[demo\]'"):
        photos.pack_photos(tmp_path)
    assert not list(tmp_path.iterdir())
