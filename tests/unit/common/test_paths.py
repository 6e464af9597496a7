"""Files are written completely or not at all, locally and in a bucket."""

import concurrent.futures
import os
import stat

import fsspec
import pytest
from etils import epath
from gcsfs.retry import HttpError
from helpers import refused

from diva_jax.common import json_files, paths
from diva_jax.common.errors import UserError
from diva_jax.training import checkpoint


@pytest.fixture
def bucket():
    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/bucket", recursive=True)


def test_text_and_bytes(tmp_path, bucket):
    for data, content in (("cafe\u0301\n", "cafe\u0301\n".encode()), (b"\x00\xff", b"\x00\xff")):
        for path in (tmp_path / "a" / "b.txt", str(tmp_path / "a" / "c.txt")):
            paths.write_whole(path, data)
            with open(path, "rb") as f:
                assert f.read() == content
        paths.write_whole("memory://bucket/a/b.txt", data)
        assert bucket.cat_file("/bucket/a/b.txt") == content
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["b.txt", "c.txt"]


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    paths.write_whole(path, "old")
    with pytest.raises(ZeroDivisionError), paths.whole_file(path) as temporary:
        temporary.write_text("half of the n")
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with paths.whole_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_permissions_are_those_of_any_new_file(tmp_path):
    paths.write_whole(tmp_path / "a", "x")
    (tmp_path / "b").write_text("x")
    assert stat.S_IMODE(os.stat(tmp_path / "a").st_mode) == stat.S_IMODE(os.stat(tmp_path / "b").st_mode)


def test_writers_of_the_same_file_do_not_meet(tmp_path):
    path = tmp_path / "a"
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: paths.write_whole(path, str(i) * 10_000), [i % 10 for i in range(80)]))
    found = path.read_text()
    assert len(found) == 10_000 and len(set(found)) == 1 and list(tmp_path.iterdir()) == [path]


def test_errors_are_oserrors(tmp_path, bucket, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        paths.write_whole(tmp_path / "file" / "a", "x")

    def refuses(*_, **__):
        raise RuntimeError("403 Forbidden")

    bucket.pipe("/bucket/a", b"")
    monkeypatch.setattr(type(bucket), "pipe_file", refuses)
    with pytest.raises(OSError, match="memory://bucket/b: RuntimeError: 403 Forbidden"):
        paths.write_whole("memory://bucket/b", "x")


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    paths.check_writable(epath.Path(tmp_path / "new" / "deep"), "--workdir")
    paths.check_writable(epath.Path("gs://bucket/runs"), "--workdir")
    for folder in ("file", "file/deep"):
        with pytest.raises(UserError, match=f"--workdir=.*{folder} cannot be a folder, as .*file is a file"):
            paths.check_writable(epath.Path(tmp_path / folder), "--workdir")
    monkeypatch.setattr(os, "access", lambda *_: False)  # Root may write everywhere.
    with pytest.raises(UserError, match="--workdir=.*new cannot be written, since .* cannot"):
        paths.check_writable(epath.Path(tmp_path / "new"), "--workdir")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("text, cleared", [
    ("https://me:secret@host/a.tar", "https://host/a.tar"),
    ("https://me:p@ss@host/a.tar", "https://host/a.tar"),
    ("see s3://KEY:SE/CRET@b/x", "see s3://b/x"), ("https://h:443/a@v1", "https://h:443/a@v1"),
    ("https://h/x#access_token=SECRET", "https://h/x#..."),
    ("https://h/x?token='SEC RET'", "https://h/x?..."),
    ("http://[x?token=SECRET", "http://..."),
    ('see http://a?x="y" and https://u@host/{0..9}.tar?token=x', "see http://a?... and https://host/{0..9}.tar?..."),
    ("gs://bucket/a/b and me@example.org?", "gs://bucket/a/b and me@example.org?"),
    ("C:/x?y data/{00..11}.tar", "C:/x?y data/{00..11}.tar"),
])  # fmt: skip
def test_secrets_of_urls(text, cleared):
    assert paths.values_without_secrets({"a": [text, 1]}) == {"a": [cleared, 1]}


@pytest.mark.parametrize("path", ["s3://bucket/x", "az://bucket/x", "nothing://x", "gs2://x"])
def test_other_schemes_are_named(path):
    refused(r"has a scheme that is not supported: use gs://", paths.folder, path, "--workdir")


@pytest.mark.parametrize("code", [401, 403, 503])
def test_what_a_bucket_refuses_is_a_sentence_and_no_damage(monkeypatch, code):
    def refuse(*_, **__):
        raise HttpError({"code": code, "message": "refused"})

    for name in ("open", "is_dir"):
        monkeypatch.setattr(type(epath.Path("gs://b/x")), name, refuse)
    for read in (
        lambda: json_files.read_bytes("gs://b/x"),
        lambda: checkpoint.read_text(epath.Path("gs://b/3"), "meta"),
        lambda: checkpoint.latest_step("gs://b/run"),
    ):
        refused(rf"gs://b/\S+ cannot be read \(HttpError: refused, {code}\): check", read)
