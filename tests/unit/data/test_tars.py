"""The index of tar shards, compared with tarfile, and for damaged files."""

import concurrent.futures
import json
import os
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
import trees
from helpers import refused
from records import encoded, noise, write_tar

from diva_jax.data import tars
from diva_jax.data.sources import open_source
from diva_jax.data.tars import TarSource

LONG = "a/" * 120 + "é" + "x" * 150 + ".jpg"  # More than the 100 + 155 bytes of a plain header.


def members(count=5):
    kinds = [lambda i: ("jpg", noise(i)), lambda i: ("json", b"{}"), lambda i: ("txt", b"caption" * i)]
    return {f"{i:09d}.{ext}": data for i in range(count) for ext, data in (kind(i) for kind in kinds)}


def test_reads_what_tarfile_reads(tmp_path):
    first = {**members(), "x.PNG": encoded(1), "y.jpeg": noise(2), "z.webp": b"w", "._y.jpeg": b"macOS", "a.cls": b"1"}
    paths = [str(tmp_path / f"{i}.tar") for i in range(4)]
    write_tar(paths[0], first)
    kinds = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE)
    write_tar(paths[1], {f"{kind.decode()}.jpg": (kind, "elsewhere.jpg") for kind in kinds} | {"c.jpg": noise(3)})
    for path, form in zip(paths[2:], (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT), strict=True):
        write_tar(path, {LONG: noise(0), "b.jpg": noise(1)}, format=form)
    source = TarSource(paths)
    expected = []
    for path in paths:
        with tarfile.open(path) as tar:
            for info in tar:
                if info.isreg() and info.name.endswith((".jpg", ".PNG", ".jpeg", ".webp")) and info.name[0] != ".":
                    expected.append((f"{path[-5:]}/{info.name}", tar.extractfile(info).read()))
    assert len(expected) == len(source) == 13
    # In any order, from many threads at once.
    order = [*range(13), *[7, 0, 8, 3, 3, 5] * 50]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert [r[:2] for r in pool.map(source.read, order)] == [expected[i] for i in order]


# Names of members and what they hold; the captions of the samples' images, or what is said of a broken one.
SAMPLES = json.loads(Path(__file__).with_name("samples.json").read_text())


@pytest.mark.parametrize("form", ["tar", "cached tar", "folder"])
def test_samples_and_their_captions(tmp_path, form, caplog):
    """Grouped alike in tars and folders, in any order of the members."""
    files, found, root = SAMPLES["files"], {}, tmp_path / ("data" if form == "folder" else "a.tar")
    shuffled = {name: files[name] for name in np.random.default_rng(1).permutation([*files])}
    trees.change(tmp_path, {"a.tar": shuffled} | {f"data/{name}": data for name, data in files.items()})
    cache = str(tmp_path / "cache") if form == "cached tar" else None
    for _ in range(2 if cache else 1):
        caplog.clear()
        source = open_source(str(root), cache)
        assert source.has_text
        assert "2 further images of samples are not read" in caplog.text and "2.seg.png" in caplog.text
        for i in range(len(source)):
            name = source.name(i).removeprefix("a.tar/")
            assert source.read(i, with_text=False)[1:3] == (files[name].encode(), None)
            try:
                found[name] = source.read(i).text
            except ValueError as e:
                assert "the caption in its .json file cannot be read" in str(e)
                found[name] = "cannot be read"
        assert found == SAMPLES["captions"]


def test_damaged_shards_keep_the_images_before_the_damage_and_are_told(tmp_path, caplog):
    path, cut, garbage = (str(tmp_path / f"{i}.tar") for i in range(3))
    write_tar(path, {"0.jpg": b"x" * 700, "1.jpg": b"y" * 512, "2.jpg": b"z"})
    with tarfile.open(path) as tar:
        ends, last = [m.offset_data + m.size for m in tar], tar.getmembers()[-1].offset
    whole = (tmp_path / "0.tar").read_bytes()
    for length in range(0, last + 1025, 64):
        (tmp_path / "1.tar").write_bytes(whole[:length])
        complete, complaint = tars.scan(cut)
        assert [m.name for m in complete] == [f"{i}.jpg" for i, end in enumerate(ends) if end <= length], length
        assert complaint, length
    assert not tars.scan(path)[1]
    os.truncate(cut, ends[1] - 1)  # The last byte of an image is missing.
    (tmp_path / "2.tar").write_bytes(bytes(range(256)) * 20)
    source = TarSource([path, cut, garbage])
    assert [source.name(i) for i in range(len(source))] == ["0.tar/0.jpg", "0.tar/1.jpg", "0.tar/2.jpg", "1.tar/0.jpg"]
    lines = [r.getMessage() for r in caplog.records]
    assert cut in lines[0] and "1 images kept" in lines[0] and garbage in lines[1] and "no uncompressed tar" in lines[1]
    assert lines[2:] == ["2 of 3 tar shards are damaged or empty"]
    os.truncate(path, 600)
    with pytest.raises(OSError, match="ends .* bytes early"):  # A shard that shrinks later.
        source.read(0)
    (tmp_path / "0.tar").write_bytes(whole[:last] + os.urandom(512) + whole[last + 512 :])
    assert len(TarSource([path])) == 2 and f"damaged at byte {last}" in caplog.text


def test_links_are_the_members_that_they_name(tmp_path, caplog):
    links = {"1.jpg": (tarfile.LNKTYPE, "./in/0.jpg"), "in/2.jpg": (tarfile.SYMTYPE, "../in/0.jpg")}
    links["3.jpg"] = (tarfile.SYMTYPE, "/etc/passwd")
    write_tar(tmp_path / "a.tar", {"./in/0.jpg": noise(0)} | links)
    source = TarSource([str(tmp_path / "a.tar")])
    assert [source.read(i)[1] for i in range(len(source))] == [noise(0)] * 3 and source.name(2) == "a.tar/in/2.jpg"
    assert "has 1 links to what is not in it (3.jpg): 3 images kept, the rest skipped" in caplog.text


def test_joined_archives_and_empty_shards_are_told(tmp_path, caplog):
    for name, found in enumerate((members(3), members(2), {})):
        write_tar(tmp_path / f"{name}.tar", found)
    (tmp_path / "0.tar").write_bytes(b"".join((tmp_path / f"{i}.tar").read_bytes() for i in (0, 1)))
    assert len(TarSource([str(tmp_path / f"{i}.tar") for i in range(3)])) == 5
    assert "0.tar goes on after its end" in caplog.text and "3 images kept" in caplog.text
    assert "2.tar has no image" in caplog.text and "2 of 3 tar shards are damaged or empty" in caplog.text


def test_shards_without_an_image_or_with_a_name_twice_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", {"a.txt": b"x"})
    with tarfile.open(tmp_path / "b.tar", "w:gz") as tar:
        tar.add(__file__, "a.jpg")
    (tmp_path / "c.tar").write_bytes(b"")
    os.symlink(tmp_path / "nowhere", tmp_path / "d.tar")
    packed, empty = (f"{tmp_path}/{n}.tar is no uncompressed tar archive" for n in "bc")
    refused(f"not one image in 3 tar files .*{packed}.*{empty}", TarSource, [str(tmp_path / f"{n}.tar") for n in "abc"])
    refused("d.tar of config.data.path cannot be read", TarSource, [str(tmp_path / "d.tar")])
    for twice in ("0.jpg", "0.txt", "0.JPG", "0.Txt"):
        write_tar(tmp_path / "twice.tar", [(name, b"a") for name in ("0.jpg", "0.txt", "1.jpg", twice)])
        refused(r"twice.tar has 0.\w+ twice, which would merge two samples", TarSource, [str(tmp_path / "twice.tar")])


@pytest.fixture
def shards(tmp_path):
    """A complete shard and one that is cut off before its first image ends."""
    write_tar(tmp_path / "0.tar", {LONG: noise(0), "b.jpg": noise(1)})
    write_tar(tmp_path / "1.tar", members(2))
    os.truncate(tmp_path / "1.tar", 1000)
    return [str(tmp_path / "0.tar"), str(tmp_path / "1.tar")]


def test_a_second_start_reads_no_header_unless_a_shard_changed(shards, tmp_path, monkeypatch, caplog):
    cache = str(tmp_path / "cache")
    first = TarSource(shards, cache)
    before = [first.read(i) for i in range(len(first))]
    assert len(os.listdir(cache)) == 1 and sorted(os.listdir(tmp_path)) == ["0.tar", "1.tar", "cache"]
    with monkeypatch.context() as patch:
        patch.setattr(tars, "scan", lambda path: pytest.fail("scanned again"))
        caplog.clear()
        with monkeypatch.context() as second:
            second.setattr(jax, "process_index", lambda: 1)
            quiet = TarSource(shards, cache)
        assert [quiet.read(i) for i in range(len(quiet))] == before and not caplog.text
        TarSource(shards, cache)
        assert "1.tar is cut short" in caplog.text  # Logged every time, not only when the index is made.
    write_tar(shards[1], members(4))
    assert len(TarSource(shards, cache)) == 6
    stat = os.stat(shards[1])
    write_tar(shards[1], dict(reversed(members(4).items())))  # The same size.
    os.utime(shards[1], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert TarSource(shards, cache).name(2) == "1.tar/000000003.jpg"


def test_a_cache_that_cannot_be_used_only_warns(shards, tmp_path, caplog):
    cache = tmp_path / "cache"
    TarSource(shards, str(cache))
    (file,) = cache.iterdir()
    for times, damage in enumerate((b"", file.read_bytes()[:300], b"garbage"), 1):
        file.write_bytes(damage)
        for _ in range(2):
            assert len(TarSource(shards, str(cache))) == 2 and caplog.text.count("building it again") == times
    (tmp_path / "file").write_text("a file where the folder should be")
    assert len(TarSource(shards, str(tmp_path / "file"))) == 2 and "could not be written" in caplog.text
