"""The data of the demo: photographs in tar shards and in a folder."""

import importlib.util

import numpy as np
import pytest

from diva_jax.common.errors import UserError
from diva_jax.data import images, photos
from diva_jax.data.sources import open_source


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return photos.pack_photos(tmp_path_factory.mktemp("photos"))


def test_shards_hold_distinct_varied_photographs_with_captions(shards):
    assert [p.name for p in shards] == ["00000.tar", "00001.tar", "00002.tar"]
    assert sum(p.stat().st_size for p in shards) < 5e6
    source = open_source(str(shards[0].parent))
    records = [source.read(i) for i in range(len(source))]
    assert [r.name for r in records] == [f"{s:05d}.tar/{s:05d}{i:04d}.jpg" for s in range(3) for i in range(32)]
    assert [r.text for r in records] == list(photos.PHOTOGRAPHS.values()) * 6
    decoded = [images.decode(r.image) for r in records]
    assert len({image.tobytes() for image in decoded}) == 96
    assert all(96 <= min(i.size) and max(i.size) <= 640 for i in decoded)
    aspects = [i.width / i.height for i in decoded]
    assert min(aspects) < 0.8 and max(aspects) > 1.25
    assert all(np.asarray(i).std() > 5 for i in decoded), "no region is blank"


def test_the_same_bytes_again_and_the_same_images_in_a_folder(shards, tmp_path):
    again = photos.pack_photos(tmp_path / "again", count=32)
    other = photos.pack_photos(tmp_path / "other", count=32, seed=1)
    assert again[0].read_bytes() == shards[0].read_bytes() != other[0].read_bytes()
    photos.write_folder(tmp_path / "folder", count=32)
    folder, tar = open_source(str(tmp_path / "folder")), open_source(str(again[0]))
    assert {folder.read(i).image for i in range(32)} == {tar.read(i).image for i in range(32)}


def test_without_scikit_image(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "skimage" else find(name))
    with pytest.raises(UserError, match=r"pip install -e '.\[demo\]'"):
        photos.pack_photos(tmp_path)
    assert not list(tmp_path.iterdir())
