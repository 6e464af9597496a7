"""Files that are whole or not at all, what importing costs and executes, signals to a command that is not training."""

import concurrent.futures
import importlib
import json
import os
import signal
import stat
import sys
import time
from pathlib import Path
from unittest import mock

import commands
import pytest
import trees
from etils import epath
from gcsfs.retry import HttpError
from helpers import failed, refused

import diva_jax
from diva_jax.common import cli, config_files, errors, json_files, paths
from diva_jax.report import page
from diva_jax.training import checkpoint, workdirs


def test_text_and_bytes(tmp_path, bucket):
    for data, content in (("cafe\u0301\n", "cafe\u0301\n".encode()), (b"\x00\xff", b"\x00\xff")):
        for path in (tmp_path / "a" / "b.txt", str(tmp_path / "a" / "c.txt")):
            paths.write_whole(path, data)
            assert Path(path).read_bytes() == content
        paths.write_whole("memory://bucket/a/b.txt", data)
        assert bucket.cat_file("/bucket/a/b.txt") == content
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["b.txt", "c.txt"]
    (tmp_path / "d").write_text("x")
    modes = [stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("a/b.txt", "d")]
    assert modes[0] == modes[1], "permissions are those of any new file"


def test_a_file_is_whole_whoever_fails_or_writes_it_at_the_same_time(tmp_path):
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
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: paths.write_whole(path, str(i) * 10_000), [i % 10 for i in range(80)]))
    found = path.read_text()
    assert len(found) == 10_000 and len(set(found)) == 1 and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_an_oserror_or_refused_before_anything_is(tmp_path, bucket, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        paths.write_whole(tmp_path / "file" / "a", "x")
    with pytest.raises(ZeroDivisionError) as caught:
        exec(compile("1 / 0", "xla_bridge.py", "exec"))
    assert cli._unexpected(caught.value)[1].startswith("error: JAX has no device, JAX_PLATFORMS=")
    assert cli._unexpected(OSError(28, "full")) == (1, "error: full: make room, and start the command again")
    bucket.pipe("/bucket/a", b"")
    monkeypatch.setattr(type(bucket), "pipe_file", mock.Mock(side_effect=RuntimeError("403 Forbidden")))
    with pytest.raises(OSError, match="memory://bucket/b: RuntimeError: 403 Forbidden"):
        paths.write_whole("memory://bucket/b", "x")
    paths.check_writable(epath.Path(tmp_path / "new" / "deep"), "--workdir")
    paths.check_writable(epath.Path("gs://bucket/runs"), "--workdir")
    assert paths.local("~/x", "--out") == Path.home() / "x"
    for name in ("file", "file/deep"):
        says = f"--workdir=.*{name} cannot be a folder, as .*file is a file"
        refused(says, paths.check_writable, epath.Path(tmp_path / name), "--workdir")
    for path in ("s3://bucket/x", "az://bucket/x", "nothing://x", "gs2://x"):
        refused(r"has a scheme that is not supported: use gs://", paths.folder, path, "--workdir")
    monkeypatch.setattr(os, "access", lambda *_: False)  # Root may write everywhere.
    says = "--workdir=.*new cannot be written, since .* cannot"
    refused(says, paths.check_writable, epath.Path(tmp_path / "new"), "--workdir")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_secrets_of_urls():
    cleared = json.loads(Path(__file__).with_name("urls.json").read_text())
    assert paths.values_without_secrets({"a": [*cleared, 1]}) == {"a": [*cleared.values(), 1]}


@pytest.mark.parametrize("code", [401, 403, 503])
def test_what_a_bucket_refuses_is_a_sentence_and_no_damage(monkeypatch, code):
    refuse = mock.Mock(side_effect=HttpError({"code": code, "message": "refused"}))
    for name in ("open", "exists"):
        monkeypatch.setattr(type(epath.Path("gs://b/x")), name, refuse)
    for read in (
        lambda: json_files.read_bytes("gs://b/x"),
        lambda: checkpoint.check_files(epath.Path("gs://b/3")),
        lambda: checkpoint.latest_step("gs://b/run"),
    ):
        says = failed if code == 503 else refused  # After which a pod starts again, or not.
        says(rf"gs://b/\S+ cannot be read \(HttpError: refused, {code}\): check", read)


@pytest.mark.parametrize("config", [
    {"objective": "foreign.evil"},
    {"objective": "diva", "diffusion": {"vae": {"_class_name": "foreign.evil.Code"}}},
    {"objective": "genhancer", "genhancer": {"vae": {"code": "foreign.evil.Code"}}},
])  # fmt: skip
def test_a_workdir_executes_nothing(tmp_path, config, monkeypatch):
    """The module on the path would leave a file."""
    monkeypatch.setattr(config_files, "_trusted", set())
    monkeypatch.setattr(config_files, "_trusts_all", False)
    monkeypatch.syspath_prepend(tmp_path)
    executed = tmp_path / "executed"
    trees.change(tmp_path, {"foreign/evil.py": f"open({str(executed)!r}, 'w')", "foreign/config.json": config})
    says = "names the module 'foreign.evil', which would be executed.*--trust_objective"
    refused(says, workdirs.read_config, tmp_path / "foreign")
    assert page._defaults(config | {"backbone": {}}) is None or config["objective"] != "foreign.evil"
    assert not executed.exists()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "foreign.evil", config_files)
        assert workdirs.read_config(tmp_path / "foreign").to_dict() == config
    for trusted in ((config,), ()):
        config_files._trusted.clear()
        config_files.trust(*trusted)
        assert workdirs.read_config(tmp_path / "foreign").to_dict() == config
    # Names that are no paths, and those of the package, are no modules.
    vae = {"_class_name": "AutoencoderKL", "code": "diva_jax.world.patch_code.PatchCodeConfig", "file": "a.b"}
    config_files.check_stored({"objective": "diva_jax.world.objectives.clip", "diffusion": {"vae": vae}}, "w")


@pytest.mark.parametrize("named", ["installed_package.objective", "installed_module"])
def test_an_error_in_an_installed_module_that_a_config_names_shows_its_line(tmp_path, monkeypatch, named):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(errors.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(errors, "named_by_configs", set())
    monkeypatch.setattr(config_files, "named_by_configs", errors.named_by_configs)
    file = tmp_path.joinpath(*named.split(".")).with_suffix(".py")
    trees.change(tmp_path, dict.fromkeys((str(file), "a_library.py"), "def loss():\n    return 1 / 0\n"))
    found = [config_files.module(named, "objective", "give another"), importlib.import_module("a_library")]
    del sys.modules["a_library"]
    for module, where in zip(found, (f"{file}:2", ""), strict=True):
        with pytest.raises(ZeroDivisionError) as caught:
            module.loss()
        caught.value.__traceback__ = caught.tb.tb_next
        assert errors.place(caught.value) == where


def run(code: str) -> str:
    return commands.output(commands.launch(sys.executable, "-c", code))


def test_the_package_imports_nothing_and_a_command_what_every_run_needs():
    """Each of the slow ones takes 50 to 500 ms to import, and is needed for some devices, data or loggers alone."""
    code = "import sys; before = set(sys.modules); import diva_jax; dir(diva_jax); print(*set(sys.modules) - before)"
    assert {name for name in run(code).split() if name.split(".")[0] not in sys.stdlib_module_names} == {"diva_jax"}
    found = set(run("import sys, diva_jax.main, diva_jax.training.loop; print(*sys.modules)").split())
    slow = ("jax.experimental.pallas.tpu", "pyarrow", "ftfy", "transformers", "tensorboardX", "torch", "tensorflow")
    assert "orbax.checkpoint" in found and not found & set(slow)
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        diva_jax.lode  # noqa: B018
    assert set(diva_jax.__all__) <= set(dir(diva_jax))


# A command that says that it waits: in the main program, or in the garbage collector, where Python drops exceptions.
COMMAND = """
import atexit, gc, os, sys, time
from diva_jax.common import cli
atexit.register(os.abort)  # As threads may crash that still compute.
where = sys.argv.pop()

def wait(*_):
    print("ready", flush=True)
    time.sleep(3)
def main():
    try:
        if where == "main":
            wait()
        elif where == "comparison":
            import jax
            static = type("Static", (), dict(__hash__=lambda _: 0, __eq__=wait))
            call = jax.jit(lambda _: 0, static_argnums=0)
            call(static()), call(static())
        else:
            gc.callbacks.append(lambda phase, _: phase == "start" and (gc.callbacks.clear(), wait()))
            gc.collect()
        time.sleep(30)
    finally:
        print("removed", flush=True)
cli.run(main)
"""


def signalled(sig, *command, **env):
    """What a command that says that it is ready prints after a signal: (exit code, output, errors)."""
    process = commands.launch(sys.executable, *command, **env)
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    process.send_signal(sig)
    found = commands.finish(process, 60)
    assert time.monotonic() - began < 9  # Less than the time after which it would have been ended from outside.
    return found


def test_tuples_of_texts_are_split_at_commas_between_entries():
    own = "probe=train=a,test=b"
    for given, want in (("mmvp=a,drift=b", ("mmvp=a", "drift=b")), (own, (own,)), (f"mmvp=c, {own}", ("mmvp=c", own))):
        assert cli._TupleParser().parse(given) == want


@pytest.mark.attack
@pytest.mark.parametrize("where", ["main", "collector", "comparison"])
@pytest.mark.parametrize("sig, code, said", [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_a_signal_ends_a_command(sig, code, said, where):
    assert signalled(sig, "-c", COMMAND, where) == (code, "removed\n", said + "\n")


@pytest.mark.attack
def test_sigint_while_a_command_imports_and_a_reader_of_its_help_that_ends_before(tmp_path):
    """A module in place of jax says when it is imported."""
    for line in ("diva_jax", "diva_jax.main --config=tiny --help"):
        assert not commands.finish(commands.launch("sh", "-c", f"{sys.executable} -m {line} | head -1"))[2]
    (tmp_path / "jax.py").write_text("import time; print('ready', flush=True); time.sleep(60)")
    assert signalled(signal.SIGINT, "-m", "diva_jax.report", "x", path=[tmp_path]) == (130, "", "interrupted\n")
