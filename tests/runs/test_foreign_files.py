"""Every file of a folder that may come from elsewhere, made to do harm: read as its declared form, or one sentence."""

import contextlib
import io
import json
import os
import resource
import shutil
import time
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import report_samples as samples
import trees
from etils import epath
from helpers import refused
from mutations import damaged_file, outcome
from records import write_shards

from diva_jax import report
from diva_jax.data import latent_cache, sources
from diva_jax.evals.tasks import mmvp
from diva_jax.report import images, inputs, page
from diva_jax.training import checkpoint, lock, metrics, workdirs
from diva_jax.weights import formats
from diva_jax.weights.export import publish

pytestmark = pytest.mark.attack


@pytest.fixture(scope="module")
def good(home):
    tasks = {"mmvp": samples.mmvp_task(samples.write_images(home, 2)), "drift": samples.drift_task()}
    tasks |= {"feedback": samples.task("feedback"), "zeroshot": samples.task("zeroshot")}
    tasks["pairs"] = samples.pairs_task([0.5, 2.0], [-1.0, 1.0])
    for task, rows in (("mmvp", "patterns"), ("feedback", "timesteps")):
        for found in tasks[task]["weights"].values():
            del found[rows][2:]
    samples.write_run(home, rows=6)
    samples.write_evaluation(home, [], "w", **tasks)
    trees.change(home, json.loads(Path(__file__).with_name("foreign.json").read_text()))
    state = {"params": {"a": np.ones(3, np.float32)}, "step": np.int32(3)}
    with checkpoint.Checkpoints(home) as checkpoints:
        checkpoints.save(3, state, {"batches": 3}, {"config": {"steps": 9}}, wait=True)
    write_shards(home / "shards", 3, 3)
    sources.open_source(str(home / "shards"), str(home / "shards"))
    return home


def show(folder):
    content = inputs.read(folder)
    assert "<script>alert" not in page.html(content, page.sections(content))


def resume(folder):
    metrics.Writer(folder, 9, tensorboard=False).close()


def restore(folder):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {"params": {"a": jax.ShapeDtypeStruct((3,), np.float32, sharding=here)}}
    abstract["step"] = jax.ShapeDtypeStruct((), np.int32, sharding=here)
    checkpoint.restore_newest(folder, lambda step: abstract)


def read_records(folder):
    source = sources.open_source(str(folder), str(folder))
    for i in range(len(source)):
        with contextlib.suppress(OSError, ValueError):  # One record, which the pipeline counts as broken.
            assert isinstance(source.read(i).text, str | None)


READERS = {
    "config.json": (workdirs.read_config, show, lambda folder: formats.read_json(folder / "config.json")),
    "results.json": (show, lambda folder: publish.scores_of(str(folder), "w", None)),
    "metrics.jsonl": (show, resume),
    "sessions.json": (show, resume),
    "images.json": (show,),
    "lock.json": (lambda folder: lock.Lock(epath.Path(folder)).close(),),
    "latents.json": (lambda folder: latent_cache.Manifest.read(folder, "field"),),
    "Patterns.json": (lambda folder: mmvp.read_patterns(str(folder / "Questions.csv")),),
    "checkpoints/3/meta/metadata": (restore, lambda workdir: checkpoint.stored(workdir, "config")),
    "checkpoints/3/data/metadata": (restore,),
    "checkpoints/3/_CHECKPOINT_METADATA": (restore, lambda folder: checkpoint.identity(folder, 3)),
    "captions/a.txt": (lambda folder: read_records(folder / "captions"),),
    "shards/tar_index": (lambda folder: read_records(folder / "shards"),),
}


def sparse(path):
    path.touch()
    os.truncate(path, 40 << 30)


def bomb(path):
    with open(path, "wb") as file:
        np.savez_compressed(file, rows=np.zeros(3 << 20), names=np.zeros(3 << 20, np.uint8))


def large_shape(path):
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (1 << 50,)})
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("rows", "names", "notes"):
            archive.writestr(f"{name}.npy", head.getvalue())


TEXTS = [b"", b"null", b"[]", b"{", b"\xff\xfe", b'{"a":' * 50_000, b"[" * 10**6, b"9" * 10**5, b"\xef\xbb\xbf[1]"]
SPECIAL = [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to("gone"), Path.mkdir]
SPECIAL += [sparse, bomb, large_shape, *(lambda path, text=text: path.write_bytes(text) for text in TEXTS)]


def attack(folder, name, write):
    path = folder / name if name != "shards/tar_index" else next(folder.glob("shards/tar_index*"))
    content = path.read_bytes()
    path.unlink()
    write(path, content)
    for read in READERS[name]:
        began = time.monotonic()
        outcome(lambda read=read: read(folder))
        assert time.monotonic() - began < 60  # With the page of a report, on a busy machine.


def copied(good, place, monkeypatch):
    monkeypatch.setattr(lock, "STALE_AFTER_S", 0.01)
    monkeypatch.setattr(lock, "SETTLED_AFTER_S", 0.0)
    return shutil.copytree(good, place)


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_such_file(good, tmp_path, monkeypatch, name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, special in enumerate(SPECIAL):
        attack(copied(good, tmp_path / str(number), monkeypatch), name, lambda path, _, make=special: make(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 << 20  # KiB


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", READERS)
def test_changed_fields_and_bytes(good, tmp_path, monkeypatch, name, seed):
    rng = np.random.default_rng(seed)
    write = lambda path, content: path.write_bytes(damaged_file(rng, name, content))  # noqa: E731
    for case in range(24 if name == "results.json" else 8):
        attack(copied(good, tmp_path / str(case), monkeypatch), name, write)


@pytest.mark.parametrize("seed", range(3))
def test_the_index_of_shards_with_other_numbers(good, tmp_path, monkeypatch, seed):
    rng = np.random.default_rng(seed)

    def write(path, content):
        with np.load(io.BytesIO(content)) as stored:
            arrays = {name: np.array(stored[name]) for name in stored}
        rows = arrays["rows"]
        field = rows.dtype.names[rng.integers(len(rows.dtype))]
        kind = np.iinfo(rows.dtype[field])
        rows[field][rng.integers(len(rows))] = rng.choice([kind.min, kind.max, 0, 1, 99])
        if rng.integers(4) == 0:
            other = [rows["size"], rows[:0], np.zeros((2, 2)), np.array("[[9, 1]]"), rows[..., None]]
            arrays[list(arrays)[rng.integers(3)]] = other[rng.integers(len(other))]
        np.savez(path, **arrays)

    for case in range(15):
        attack(copied(good, tmp_path / str(case), monkeypatch), "shards/tar_index", write)


NAMES = ["../../up", "/abs", "a/b", "..", "", ".", "x\0y", "con:aux", "é" * 200, "n\n", "same", "SAME"]


def test_names_are_never_paths(tmp_path):
    """Names of tasks and metrics are part of the names of images."""
    task = samples.task("feedback")
    for weights in task["weights"].values():
        del weights["timesteps"][2:]
        for bins in weights["timesteps"]:
            bins["scores"] = {"gap_other": bins["scores"]["gap_other"]}
    results = {"schema": 1, "weights": [{"label": n} for n in task["weights"]], "tasks": {n: task for n in NAMES}}
    (tmp_path / "in").mkdir()
    (tmp_path / "in/results.json").write_text(json.dumps(results))
    before = {p for p in tmp_path.rglob("*")}
    written = report.write(tmp_path / "in")
    assert len(set(written)) == len(written) == 1 + len(NAMES)
    for made in {p for p in tmp_path.rglob("*")} - before:
        assert made == tmp_path / "in/report" or made.parent == tmp_path / "in/report" or made.name == "report.html"


def test_nothing_is_written_through_links(tmp_path):
    samples.write_run(tmp_path / "run", rows=6)
    names = [path.name for path in report.write(tmp_path / "run")[1:]]
    (tmp_path / "precious").write_text("precious")
    for place in ("report.html", *(f"report/{name}" for name in names)):
        (tmp_path / "run" / place).unlink()
        (tmp_path / "run" / place).symlink_to(tmp_path / "precious")
    report.write(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "precious"
    (tmp_path / "run/report").rename(tmp_path / "elsewhere")
    (tmp_path / "run/report").symlink_to(tmp_path / "elsewhere")
    refused("report is a link, through which nothing is written: remove it", report.write, tmp_path / "run")


def test_what_is_no_image_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "a.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    for name in ("pipe.jpg", "zero.jpg", "a.eps", "", "\0", "gone.png", "a" * 5000):
        assert images._thumbnail(str(tmp_path / name)).uri == ""


@pytest.mark.parametrize("source", ["~nobody-of-this-name/x", "gs://no-such-bucket-at-all", "s3://x/y", "\0", "", "."])
def test_workdirs_that_cannot_be_found_are_left_out(tmp_path, source):
    samples.write_evaluation(tmp_path, [], source, drift=samples.drift_task())
    content = inputs.read(tmp_path)
    said = f"{source} is not here" if source.strip() and ":" not in source else None
    assert (said in page.html(content, page.sections(content))) if said else not content.missing
