"""Data and tokenizers that were made to do harm: counted as broken or refused, within bounded memory and time."""

import collections
import errno
import gzip
import json
import os
import resource
import tarfile
import threading
import time
from unittest import mock

import eval_data
import numpy as np
import pytest
import trees
from helpers import failed, refused
from mutations import damaged, damaged_file, outcome
from PIL import Image
from records import batches, data_config, encoded, saved, tags, write_shards

from diva_jax import demo
from diva_jax.common.errors import RunError, UserError
from diva_jax.data import files, images, inputs, labelled, pipeline, tars, tokenizers
from diva_jax.evals.tasks import choice, mmvp
from diva_jax.models.backbones import TextSpec

pytestmark = pytest.mark.attack


@pytest.mark.parametrize("seed", range(10))
def test_shards_with_changed_bytes(tmp_path, seed):
    """Members are those that were written, or left out; nothing but a UserError or a RunError comes out."""
    write_shards(tmp_path, 12, 12)
    path = tmp_path / "00000.tar"
    path.write_bytes(damaged(np.random.default_rng(seed), path.read_bytes(), most=20))
    try:
        assert next(batches(tmp_path, batch=4, max_broken_share=1.0))["image"].shape == (4, 12, 12, 3)
    except (UserError, RunError) as e:
        assert "\n" not in str(e)


def extended(key: bytes, value: bytes) -> bytes:
    size = len(key) + len(value) + 3
    record = b"%d %s=%s\n" % (size + len(str(size + len(str(size)))), key, value)
    header, info, image = tarfile.TarInfo("x"), tarfile.TarInfo("1.png"), encoded(1)
    header.type, header.size, info.size = b"x", len(record), len(image)
    parts = (header.tobuf(tarfile.USTAR_FORMAT), record, info.tobuf(), image, bytes(1024))
    return b"".join(part + bytes(-len(part) % 512) for part in parts)


KEYS = [b"size", b"mtime", b"uid", b"path", b"GNU.sparse.size", b"GNU.sparse.map", b"hdrcharset"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", [b"9" * 1_000_000, b"-1", b"-99999999", b"1e999", b"nan", b"", b"\xff\xfe", b"0,1,2"])
def test_extended_headers(tmp_path, key, value):
    path, began = tmp_path / "a.tar", time.monotonic()
    path.write_bytes(extended(key, value))
    for member in tars.scan(str(path))[0]:
        assert 0 <= member.offset and 0 <= member.size <= path.stat().st_size
    assert time.monotonic() - began < 5


def test_sparse_files_are_not_held_in_memory(tmp_path):
    """Headers and images that declare gigabytes, in files that take no room."""
    size, before = 2**33 - 1, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        info, path = tarfile.TarInfo("x"), tmp_path / "x"
        info.type, info.size = kind, size
        path.write_bytes(info.tobuf(tarfile.GNU_FORMAT))
        os.truncate(path, size + 4096)
        assert not tars.scan(str(path))[0]
    path.unlink()
    (tmp_path / "a.jpg").touch()
    os.truncate(tmp_path / "a.jpg", size)
    failed("not one of the 1 images", lambda: next(batches(tmp_path, batch=4)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # KiB


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    for name in ("a.tar", "b.tar"):
        folder = tmp_path / name[0]
        folder.mkdir()
        os.mkfifo(folder / name) if name[0] == "a" else (folder / name).symlink_to("/dev/zero")
        for path in (folder, folder / name):
            refused("is not a regular file", batches, path)
    os.mkfifo(tmp_path / "c.png")
    trees.change(tmp_path, {f"{i}.png": encoded(i) for i in range(3)})
    assert set(tags(next(batches(f"{tmp_path}/*.png", max_broken_share=1.0))["image"])) <= {0, 1, 2}


@pytest.mark.parametrize("number, failures", [(errno.EIO, 1), (errno.ESTALE, 2), (errno.EMFILE, 10**6)])
def test_reads_that_fail_for_a_while_are_tried_again(tmp_path, monkeypatch, number, failures):
    """They are no broken images; one that goes on failing is."""
    monkeypatch.setattr(pipeline, "_RETRY_PAUSES_S", (0.0, 0.0))
    write_shards(tmp_path, 12, 12)
    read, times = files.read_range, collections.Counter()

    def failing(path, offset, size):
        times[path, offset] += 1
        if times[path, offset] <= failures:
            raise OSError(number, "try later")
        return read(path, offset, size)

    iterator = batches(tmp_path, max_broken_share=1.0)
    monkeypatch.setattr(files, "read_range", failing)
    if failures > 2:
        failed("not one of the 12 images", next, iterator)
    else:
        assert tags(next(iterator)["image"])
    assert iterator.decoder.count == (12 if failures > 2 else 0)


def test_where_memory_runs_out_no_image_is_broken(tmp_path, monkeypatch):
    write_shards(tmp_path, 12, 12)
    iterator = batches(tmp_path)
    monkeypatch.setattr(images, "decode", mock.Mock(side_effect=MemoryError))
    failed(r"memory ran out while .*\.tar/.* was read: lower config.data.threads", next, iterator)
    assert not iterator.decoder.count


def test_grey_images_of_sixteen_bits_and_thin_ones():
    """Converted by range, where Pillow cuts off at 255; those without a range are broken, and so are thin ones."""
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    for form in ("PNG", "TIFF"):
        data = saved(Image.fromarray(values), form)
        found = np.array([images.decode(data, rgb).convert("RGB") for rgb in (True, False)])
        assert np.abs(found - (values / 257)[..., None]).max() <= 0.51
    thin = (Image.new("L", (1, 501)), "too far from a square")
    for image, says in (thin, *((Image.fromarray(values.astype(d)), "no range") for d in (np.int32, np.float32))):
        with pytest.raises(ValueError, match=says):
            images.decode(saved(image, "TIFF"))


def test_images_of_every_suffix_are_read_and_what_is_left_out_is_said(tmp_path, caplog):
    forms = {"bmp": "BMP", "gif": "GIF", "tif": "TIFF", "tiff": "TIFF", "jfif": "JPEG", "JPG": "JPEG", "webp": "WEBP"}
    members = {f"{i}.{suffix}": encoded(5, form=form) for i, (suffix, form) in enumerate(forms.items())}
    trees.change(tmp_path, {"a.tar": members} | {f"folder/{name}": data for name, data in members.items()})
    for path in (tmp_path / "folder", tmp_path / "a.tar"):
        iterator = batches(path, batch=len(forms), max_broken_share=0.0)
        assert next(iterator)["row"].tolist() == list(range(len(forms))) and not iterator.decoder.count
    write_shards(beside := tmp_path / "beside", 4, 4)
    trees.change(beside, {"x.jpg": encoded(1, form="JPEG"), "y.tar.gz": ""})
    batches(beside, batch=4)
    assert "1 images beside the tars are not read" in caplog.text and "1 compressed shards" in caplog.text


def test_a_wait_for_data_ends(monkeypatch):
    released = threading.Event()

    def read(i, with_text=True):
        released.wait(20)
        raise OSError("gone")

    source = mock.MagicMock(has_text=False, read=read)
    source.name, source.__len__.return_value = (lambda i: f"shard.tar/{i}\x1b[31m.png"), 5
    monkeypatch.setattr(pipeline, "open_records", lambda *_, **__: source)
    settings = data_config("x", stall_timeout=1.0)
    iterator = pipeline.Batches(settings, {"image": inputs.Image(12)}, seed=0, global_batch=4)
    began = time.monotonic()
    assert iterator.wait(lambda: True) is None
    assert time.monotonic() - began < 5 and iterator.get_state()["batches"] == 0
    failed(r"stall_timeout=1\), \d+ s of them reading shard.tar/\d\\x1b", next, iterator)
    iterator.close()
    assert time.monotonic() - began < 10
    released.set()


TEXT = TextSpec(vocab_size=516, context_length=9)
TEXTS = ["a photo of a cat", "", "ünï " * 50, "\x00\x1b[31m", "<end_of_text>"]
CONFIG = {"tokenizer_class": "CLIPTokenizer", "pad_token": "!", "auto_map": {"AutoTokenizer": ["a--b", None]}}
BPE = "bpe_simple_vocab_16e6.txt.gz"


@pytest.fixture(scope="module")
def good(home):
    eval_data.write_mmvp(home / "mmvp")
    eval_data.write_choices(home / "choice", "add_att")
    eval_data.write_choices(home / "pairs", "winoground")
    files = {"csv/a.jpg": "PNG", "csv/c.csv": {"image": ["./" * i + "a.jpg" for i in range(5)], "caption": ["x"] * 5}}
    files |= {"csv/names.json": {"a": ["b", "c"], "d": ["e"]}, "csv/nshards.txt": "3"}
    for name in ("vocab", "prompt"):
        demo.write_byte_tokenizer(home / name)
        files[f"{name}/merges.txt"] = "#version: 0.2\n"
    vocab = json.loads((home / "vocab/vocab.json").read_text())
    words = {token: i for token, i in vocab.items() if i < 512}
    added = [{"id": i, "content": token} for token, i in vocab.items() if i >= 512]
    files["tok/tokenizer.json"] = {"added_tokens": added, "model": {"type": "BPE", "vocab": words, "merges": []}}
    files |= {"prompt/tokenizer_config.json": CONFIG, f"bpe/{BPE}": gzip.compress(b"#version\na b\nc d</w>")}
    trees.change(home, files)
    return home


def questions(path):
    for question in mmvp.read_questions(str(path.parent)):
        assert question.image.resolve().is_relative_to(path.parent.resolve()) and question.text


def choices(path):
    ((_, row),) = choice.published(path, "")
    for item in choice.read_set(path, row, "", True):
        assert all(isinstance(text, str) and text for text in item.texts)
        assert all(image.path.is_file() for image in item.images)


def tokens(path):
    ids = tokenizers.open_tokenizer(TEXT, path.parent)(TEXTS)
    assert ids.shape == (len(TEXTS), 9) and 0 <= ids.min() and ids.max() < TEXT.vocab_size


def prompt(path):
    """Through transformers, which must not run the code that `auto_map` names."""
    found = tokenizers.FolderTokenizer(path.parent, 6, kind="clip").encode(["a photo", "a \ud83d"])
    assert found[0].shape == found[1].shape == (2, 6)


READERS = {
    "mmvp/Questions.csv": questions, "choice/add_att.json": choices, "pairs/examples.jsonl": choices,
    "csv/c.csv": labelled.caption_csv, "csv/names.json": lambda path: labelled.read_names(str(path)),
    "csv/nshards.txt": lambda path: labelled.tars(path.parent, "cls", int),
    "vocab/vocab.json": tokens, "vocab/merges.txt": tokens, "tok/tokenizer.json": tokens, f"bpe/{BPE}": tokens,
    "prompt/vocab.json": prompt, "prompt/merges.txt": prompt, "prompt/tokenizer_config.json": prompt,
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", READERS)
def test_changed_fields_and_bytes(good, name, seed):
    """Refused in one sentence, or used: with values changed in JSON, and with bytes changed in any file."""
    path, read, rng = good / name, READERS[name], np.random.default_rng(seed)
    data = path.read_bytes()
    for _ in range(8 if read is prompt else 30):
        path.write_bytes(damaged_file(rng, name, data))
        outcome(lambda: read(path))
    path.write_bytes(data)
    if name != "csv/nshards.txt":
        read(path)


def test_files_that_unpack_to_too_much(tmp_path):
    (tmp_path / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(bytes(2**27), 1))
    refused("more than 64 MiB", tokenizers.open_tokenizer, TEXT, tmp_path)
