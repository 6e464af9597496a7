"""The index of tar shards, compared with tarfile, and for damaged files."""

import concurrent.futures
import logging
import os
import tarfile

import pytest
from records import encoded, noise, write_tar
from tqdm import tqdm

from diva_jax.common.errors import UserError
from diva_jax.data import tars
from diva_jax.data.tars import TarSource

LONG = "a/" * 120 + "é" + "x" * 150 + ".jpg"  # More than the 100 + 155 bytes of a plain header.


def members(count=5, start=0):
    return {
        f"{i:09d}.{ext}": data
        for i in range(start, start + count)
        for ext, data in (("jpg", noise(i)), ("json", b"{}"), ("txt", b"caption" * i))
    }


def test_reads_what_tarfile_reads(tmp_path):
    first = {**members(), "x.PNG": encoded(1), "y.jpeg": noise(2), "z.webp": b"w", "._y.jpeg": b"macOS", "a.cls": b"1"}
    write_tar(tmp_path / "00000.tar", first)
    write_tar(tmp_path / "00001.tar", members(3, start=5))
    source = TarSource([str(tmp_path / "00000.tar"), str(tmp_path / "00001.tar")])
    expected = []
    for shard in ("00000.tar", "00001.tar"):
        with tarfile.open(tmp_path / shard) as tar:
            for info in tar:
                if info.name.endswith((".jpg", ".PNG", ".jpeg", ".webp")) and not info.name.startswith("."):
                    expected.append((f"{shard}/{info.name}", tar.extractfile(info).read()))
    assert len(expected) == len(source) == 11
    assert [source.read(i)[:2] for i in range(len(source))] == expected
    # In any order, from many threads at once.
    order = [7, 0, 10, 3, 3, 9] * 50
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert [r[:2] for r in pool.map(source.read, order)] == [expected[i] for i in order]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(tmp_path, form):
    write_tar(tmp_path / "a.tar", {LONG: noise(0), "b.jpg": noise(1)}, format=form)
    source = TarSource([str(tmp_path / "a.tar")])
    assert source.read(0)[:2] == (f"a.tar/{LONG}", noise(0))
    assert source.read(1)[:2] == ("a.tar/b.jpg", noise(1))


def test_folders_and_links_are_no_images(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo(f"{kind.decode()}.jpg")
            info.type, info.linkname = kind, "elsewhere.jpg"
            tar.addfile(info)
        (tmp_path / "c.jpg").write_bytes(noise(3))
        tar.add(tmp_path / "c.jpg", "c.jpg")
    source = TarSource([str(tmp_path / "a.tar")])
    assert [source.name(i) for i in range(len(source))] == ["a.tar/c.jpg"]


def test_captions_of_samples(tmp_path):
    """`.txt` before `.json`, in any order of the members, of the same stem or else of the webdataset sample."""
    every = {
        "a/0.txt": "café".encode(),
        "a/0.jpg": noise(0),
        "a/0.json": b'{"caption": "not this one"}',
        "1.jpg": noise(1),
        "1.json": b'{"caption": "of the json"}',
        "2.v1.jpg": noise(2),
        "2.v2.jpg": noise(3),
        "2.v1.txt": b"version one",
        "2.txt": b"the sample's",
        "3.jpg": noise(4),
        "4.jpg": noise(5),
        "4.json": b'{"caption": null, "key": "4"}',
        "5.jpg": noise(6),
        "5.json": b'{"caption": ["one", "two"]}',
        "6.jpg": noise(7),
        "6.json": b"{broken",
        "7.jpg": noise(8),
        "7.txt": b"x" * (tars._MAX_CAPTION_BYTES + 1),
    }
    write_tar(tmp_path / "a.tar", every)
    for _ in range(2):  # The second time from the cache.
        source = TarSource([str(tmp_path / "a.tar")], str(tmp_path / "cache"))
        assert source.has_text
        texts = [source.read(i).text for i in (0, 1, 2, 3, 4, 5, 6, 8)]
        assert texts == ["café", "of the json", "version one", "the sample's", None, None, "one\ntwo", None]
        with pytest.raises(ValueError, match="the caption in its .json member cannot be read"):
            source.read(7)
        assert source.read(7, with_text=False)[:2] == ("a.tar/6.jpg", noise(7))


@pytest.mark.parametrize(
    "extra, has",
    [({}, False), ({"0.json": b"{}"}, False), ({"0.json": b'{"caption": ""}'}, True), ({"0.txt": b""}, True)],
)
def test_whether_there_are_captions(tmp_path, extra, has):
    write_tar(tmp_path / "a.tar", {"0.jpg": noise(0), "1.jpg": noise(1), "x.txt": b"of no image", **extra})
    assert TarSource([str(tmp_path / "a.tar")]).has_text == has


def cut(path, length):
    os.truncate(path, length)
    return path


def test_a_truncated_shard_keeps_what_is_whole(tmp_path, caplog):
    good, bad, garbage = (str(tmp_path / name) for name in ("0.tar", "1.tar", "2.tar"))
    write_tar(good, members(3))
    write_tar(bad, members(4))
    with tarfile.open(bad) as tar:
        third = tar.getmember("000000002.jpg")
    with open(garbage, "wb") as f:
        f.write(bytes(range(256)) * 20)
    cut(bad, third.offset_data + third.size - 1)  # Its last byte is missing.
    with caplog.at_level(logging.WARNING):
        source = TarSource([good, bad, garbage])
    assert [source.name(i) for i in range(len(source))] == [
        *(f"0.tar/{i:09d}.jpg" for i in range(3)),
        *(f"1.tar/{i:09d}.jpg" for i in range(2)),
    ]
    assert [source.read(i)[1] for i in range(5)] == [noise(0), noise(1), noise(2), noise(0), noise(1)]
    lines = [r.getMessage() for r in caplog.records]
    assert sum(bad in line for line in lines) == 1 and sum(garbage in line for line in lines) == 1
    assert not any(good in line for line in lines)
    assert lines[-1] == "2 of 3 tar shards are damaged"
    assert "2 images kept" in lines[0] and "no uncompressed tar" in lines[1]


def test_every_length_of_a_cut_shard(tmp_path):
    """Wherever a file is truncated, exactly the images before are read, and a warning is logged."""
    path = str(tmp_path / "a.tar")
    write_tar(path, {"0.jpg": b"x" * 700, "1.jpg": b"y" * 512, "2.jpg": b"z"})
    with tarfile.open(path) as tar:
        ends = [m.offset_data + m.size for m in tar]
        archive_end = tar.getmembers()[-1].offset_data + 512
    whole = (tmp_path / "a.tar").read_bytes()
    for length in range(0, archive_end + 1, 64):
        (tmp_path / "b.tar").write_bytes(whole[:length])
        complete, complaint = tars.scan(str(tmp_path / "b.tar"))
        assert [m.name for m in complete] == [f"{i}.jpg" for i, end in enumerate(ends) if end <= length], length
        assert complaint, length
    assert not tars.scan(path)[1]


def test_damage_in_the_middle_is_told(tmp_path, caplog):
    path = tmp_path / "a.tar"
    write_tar(path, members(4))
    with tarfile.open(path) as tar:
        hit = tar.getmember("000000002.json").offset
    data = bytearray(path.read_bytes())
    data[hit : hit + 512] = os.urandom(512)
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert len(TarSource([str(path)])) == 3  # 0, 1, 2: the third image comes before its json.
    assert f"damaged at byte {hit}" in caplog.text


def test_no_image_at_all(tmp_path):
    write_tar(tmp_path / "a.tar", {"a.txt": b"x"})
    (tmp_path / "b.tar").write_bytes(b"")
    with pytest.raises(UserError, match="not one image in 2 tar files .*b.tar is no uncompressed tar archive"):
        TarSource([str(tmp_path / "a.tar"), str(tmp_path / "b.tar")])


def test_a_compressed_tar_is_told_apart(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.add(__file__, "a.jpg")
    with pytest.raises(UserError, match="no uncompressed tar archive"):
        TarSource([str(tmp_path / "a.tar")])


def test_a_shard_that_cannot_be_opened_stops(tmp_path):
    os.symlink(tmp_path / "nowhere", tmp_path / "a.tar")
    with pytest.raises(UserError, match="a.tar of config.data.path cannot be read"):
        TarSource([str(tmp_path / "a.tar")])


def test_a_shard_that_shrinks_later_is_an_error_not_garbage(tmp_path):
    path = str(tmp_path / "a.tar")
    write_tar(path, members(2))
    source = TarSource([path])
    cut(path, 600)
    with pytest.raises(OSError, match="ends .* bytes early"):
        source.read(1)


class TestCache:
    def source(self, folder, cache, **kw):
        return TarSource(sorted(str(p) for p in folder.glob("*.tar")), str(cache), **kw)

    @pytest.fixture
    def shards(self, tmp_path):
        folder = tmp_path / "data"
        folder.mkdir()
        write_tar(folder / "0.tar", {LONG: noise(0), "b.jpg": noise(1)})
        write_tar(folder / "1.tar", members(2))
        cut(folder / "1.tar", 1000)
        return folder

    def test_second_start_reads_no_header(self, shards, tmp_path, monkeypatch, caplog):
        cache = tmp_path / "cache"
        first = self.source(shards, cache)
        before = [first.read(i) for i in range(len(first))]
        assert len(list(cache.iterdir())) == 1 and sorted(os.listdir(shards)) == ["0.tar", "1.tar"]
        monkeypatch.setattr(tars, "scan", lambda path: pytest.fail("scanned again"))
        caplog.clear()
        second = self.source(shards, cache)
        assert [second.read(i) for i in range(len(second))] == before
        assert "1.tar is cut short" in caplog.text  # Logged every time, not only when the index is made.

    def test_a_changed_shard_is_indexed_again(self, shards, tmp_path):
        cache = tmp_path / "cache"
        assert len(self.source(shards, cache)) == 2
        write_tar(shards / "1.tar", members(4))
        assert len(self.source(shards, cache)) == 6
        stat = os.stat(shards / "1.tar")
        write_tar(shards / "1.tar", {k: v for k, v in reversed(members(4).items())})  # The same size.
        os.utime(shards / "1.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        assert self.source(shards, cache).name(2) == "1.tar/000000003.jpg"

    def test_a_corrupt_cache_is_built_again(self, shards, tmp_path, caplog):
        cache = tmp_path / "cache"
        self.source(shards, cache)
        (file,) = cache.iterdir()
        for damage in (b"", file.read_bytes()[:300], b"garbage"):
            file.write_bytes(damage)
            assert len(self.source(shards, cache)) == 2
        assert "building it again" in caplog.text
        caplog.clear()
        self.source(shards, cache)
        assert "building it again" not in caplog.text

    def test_a_cache_that_cannot_be_written_only_warns(self, shards, tmp_path, caplog):
        (tmp_path / "cache").write_text("a file where the folder should be")
        assert len(self.source(shards, tmp_path / "cache")) == 2
        assert "could not be written" in caplog.text

    def test_quiet(self, shards, tmp_path, caplog):
        self.source(shards, tmp_path / "cache", quiet=True)
        assert not caplog.text


def test_progress_of_a_long_index(tmp_path, monkeypatch, capsys):
    shards = [str(tmp_path / f"{i}.tar") for i in range(9)]
    for shard in shards:
        write_tar(shard, members(1))
    TarSource(shards)
    assert not capsys.readouterr().err
    monkeypatch.setattr(tars, "tqdm", lambda *a, **kw: tqdm(*a, **{**kw, "delay": 0, "mininterval": 0}))
    TarSource(shards, quiet=True)
    assert not capsys.readouterr().err
    TarSource(shards)
    assert "indexing tar shards: 100%" in capsys.readouterr().err
