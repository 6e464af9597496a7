"""Runs with data and workdir in a bucket, on an emulator of Google Cloud Storage, through gcsfs and tensorstore."""

import contextlib
import random
import re
import threading
from functools import partial
from http.server import ThreadingHTTPServer
from types import SimpleNamespace
from unittest import mock
from urllib.parse import unquote

import aiohttp
import commands
import fsspec
import gcp_storage_emulator.server as emulator
import jax
import numpy as np
import pytest
from etils import epath
from gcp_storage_emulator.exceptions import NotFound
from helpers import failed, refused, rows
from jax.sharding import NamedSharding, PartitionSpec as P
from processes import ROTATIONS, STEPS, finish, start_all

from diva_jax import config, report
from diva_jax.common import paths
from diva_jax.training import checkpoint, compiler, partition, workdirs
from diva_jax.weights import origins


class Handler(emulator.RequestHandler):
    """The emulator's handler, for one request at a time, which also returns the version of a file with its content."""

    turn = threading.Lock()

    def parse_request(self):
        if super().parse_request():  # The request has arrived before the lock is taken, so that no idle one blocks it.
            with self.turn:
                getattr(self, f"do_{self.command}")()
        return False  # done

    def end_headers(self):
        if found := re.match(r"/.*/b/([^/]+)/o/([^?]+)\?.*alt=media", self.path):
            with contextlib.suppress(NotFound):
                version = self.storage.get_file_obj(found[1], unquote(found[2]))["generation"]
                self.send_header("x-goog-generation", version)
        super().end_headers()


class Threads(ThreadingHTTPServer):
    """One thread per connection; a connection that is closed early is not an error."""

    daemon_threads = True

    def __init__(self, address, handler):
        super().__init__(address, partial(Handler, *handler.args))

    def handle_error(self, *_):
        pass


@pytest.fixture(scope="module")
def bucket():
    """Yields the path of an empty bucket that this process and its subprocesses can access."""
    emulator.server = SimpleNamespace(HTTPServer=Threads)
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    address = f"http://127.0.0.1:{server._api._httpd.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", address)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        yield epath.Path("gs://bucket")
    server.stop()


def test_two_processes_with_data_and_workdir_in_a_bucket(files, bucket, tmp_path):
    """A run is stopped by SIGTERM, resumed, exported and reported, all with gs:// paths."""
    for shard in (files / "photos").glob("*.tar"):
        (bucket / "photos" / shard.name).write_bytes(shard.read_bytes())
    workdir = bucket / "runs" / "a"
    more = [f"--config.data.path={bucket}/photos/*.tar", "--config.compile_cache=auto", "--config.log.tensorboard=true"]
    more += ["--config.profile.start=1", "--config.profile.steps=1"]
    two = start_all(files, workdir, 2, *more, rows=tmp_path / "first")
    commands.wait_for_step(two[0], 2)
    two[1].terminate()
    ends = finish(two)
    assert [code for code, _, _ in ends] == [0, 0], ends
    saved = checkpoint.latest_step(workdir)
    assert 2 <= saved < STEPS and not (workdir / "done").exists()
    ends = finish(start_all(files, workdir, 1, *more, rows=tmp_path / "second"))
    assert [code for code, _, _ in ends] == [0], ends
    printed = (workdir / "log.txt").read_text()
    assert 0 <= printed.find(f"saved step {saved}") < printed.find(f"resumed from the checkpoint of step {saved}")
    assert checkpoint.latest_step(workdir) == STEPS and (workdir / "done").exists()
    assert [r["step"] for r in rows(workdir)] == list(range(1, STEPS + 1))
    for folder in ("tensorboard", "cache/compiled", "profile/plugins/profile"):
        assert list((workdir / folder).iterdir()), folder
    assert list((workdir / "cache").glob("tar_index_*"))
    for source, step in ((f"{workdir}:{saved}", saved), (str(workdir), STEPS)):
        assert origins.find(source, "--weights")[:2] == (str(workdir), step)
    commands.succeed("export_torch", f"--workdir={workdir}", f"--out={tmp_path / 'tuned'}", "--trust_objective")
    assert (tmp_path / "tuned" / "open_clip_model.safetensors").exists()
    commands.succeed("report", workdir)
    assert "</html>" in (workdir / "report.html").read_text()


def test_what_is_not_there_is_refused_in_one_sentence(files, bucket):
    code, _, err = commands.run("main", f"{ROTATIONS}{files}", "--workdir=gs://nowhere/run")
    assert code == 2 and "gs://nowhere" in err.splitlines()[-1] and "Traceback" not in err, err  # After warnings.
    refused("holds no run", workdirs.RunAt.open, "gs://bucket/none")
    refused("--out=gs://bucket/x must be a folder", paths.local, "gs://bucket/x", "--out")
    refused("mount the bucket", origins.find, "gs://bucket/clip", "--source")
    refused("gs://bucket/none is not a folder", report.write, "gs://bucket/none")


def test_a_bucket_that_vanishes_while_saving(bucket, monkeypatch):
    monkeypatch.setattr(checkpoint, "_RETRY_AFTER_S", (0.01,))
    store, state = fsspec.filesystem("gs"), {"x": np.arange(3.0)}
    store.mkdir("doomed")
    checkpoints = checkpoint.Checkpoints("gs://doomed/run")
    checkpoints.save(1, state, {}, {}, wait=True)
    assert checkpoint.steps("gs://doomed/run") == [1]
    store.rm("doomed/run", recursive=True)
    store.rmdir("doomed")
    says = "step 2: no checkpoint can be written to gs://doomed/run/checkpoints"
    failed(says, checkpoints.save, 2, state, {}, {}, wait=True)
    checkpoints.close()


def test_a_bucket_that_does_not_answer_is_not_an_empty_one(monkeypatch):
    workdir = "gs://bucket/run"
    monkeypatch.setattr(type(epath.Path(workdir)), "exists", mock.Mock(side_effect=aiohttp.ClientOSError("no answer")))
    failed("cannot be read .*ClientOSError", checkpoint.latest_step, workdir)
    failed("cannot be read .*ClientOSError", checkpoint.restore_newest, workdir, dict)
    failed("--workdir=gs://bucket/run cannot be reached", paths.folder, workdir, "--workdir")
    failed("step 3 in gs://bucket/run cannot be read .*ClientOSError", checkpoint.restore_arrays, workdir, 3, {})


def test_executables_in_a_bucket(bucket):
    c = config.default()
    program = SimpleNamespace(config=c, mesh=partition.make_mesh(c.mesh), stages=[SimpleNamespace(name="tune")])
    one = random.random()  # XLA writes no executable for a CPU that it has read from jax's cache.
    lowered = jax.jit(lambda x: 2 * x + one).lower(jax.device_put(np.arange(5.0), NamedSharding(program.mesh, P())))
    facts = compiler.executable_facts(lowered, program)
    refused("aot --save=gs://bucket/saved", compiler.saved_in, "gs://bucket/saved")
    compiler.save_executable("gs://bucket/saved", 0, facts, lowered.compile(), program)
    loaded = compiler.load_executable(compiler.saved_in("gs://bucket/saved"), 0, lowered, program)
    given = jax.device_put(np.arange(5.0), NamedSharding(program.mesh, P()))
    np.testing.assert_array_equal(loaded(given), 2 * np.arange(5.0, dtype=np.float32) + np.float32(one))


def test_a_mirror_copies_what_changed(bucket):
    mirror = paths.Mirror(bucket / "mirror", every=3600)
    (mirror.local / "a").mkdir()
    (mirror.local / "a" / "x").write_text("1")
    mirror.push()
    assert not (bucket / "mirror").exists()
    mirror.push(force=True)
    (bucket / "mirror" / "a" / "x").write_text("theirs")
    (mirror.local / "y").write_text("2")
    mirror.close()
    assert (bucket / "mirror" / "y").read_text() == "2"
    assert (bucket / "mirror" / "a" / "x").read_text() == "theirs", "copied again without a change"
    assert not mirror.local.exists()


def test_without_gcsfs(monkeypatch):
    monkeypatch.setattr(epath.gpath.PosixGPath, "exists", mock.Mock(side_effect=ImportError("no gcsfs")))
    refused(r"pip install -e '.\[gcs\]'", paths.folder, "gs://bucket/run", "--workdir")
