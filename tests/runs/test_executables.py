"""Options of the compiler, and executables in a folder: as they were saved, or refused before they are unpickled."""

import hashlib
import json
import pickle
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from e2e_config import rotations
from etils import epath
from helpers import refused
from jax.experimental.compilation_cache import compilation_cache

from diva_jax import config
from diva_jax.costs import chips
from diva_jax.training import compiler, step
from diva_jax.training.step import Steps


def lowered(p):
    return p.step(0).lower(p.abstract_state(0), p.abstract_frozen(), p.abstract_batch())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the executable of `rotations()` on two devices, at the precision of the tests; not one from jax's cache, as
    XLA writes none for a CPU that it has read."""
    p, path = small.program(rotations(), 2), tmp_path_factory.mktemp("saved")
    with jax.default_matmul_precision("highest"):
        step = lowered(p)
    known, before = compiler.executable_facts(step, p), jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    compiler.save_executable(path, 0, known, compiler.compiled(step), p)
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()
    return compiler.saved_in(str(path))


def one_step(p, saved=None):
    arrays = small.random_arrays(p)
    state, frozen = p.init_state({n: arrays[n] for n in p.trained}), {n: arrays[n] for n in p.abstract_frozen()}
    return Steps(p, saved=saved)(0, state, frozen, small.batch(p, 0))


def test_a_saved_step_is_the_compiled_one(folder, monkeypatch, capfd):
    """Bit for bit, for a schedule of another length too, and nothing is compiled."""
    expected = one_step(small.program(rotations(steps=37), 2))
    monkeypatch.setattr(compiler, "compiled", lambda lowered: pytest.fail("compiled"))
    jax.tree.map(np.testing.assert_array_equal, one_step(small.program(rotations(steps=37), 2), folder), expected)
    said = capfd.readouterr().out
    assert f"not compiled: {folder}/0-" in said and "ready in" in said


def copied(folder, tmp_path, change):
    """A copy of the folder in which `change` has replaced fields of the JSON file and the executable."""
    (name,) = (file.stem for file in folder.glob("*.json"))
    saved, data = json.loads((folder / f"{name}.json").read_text()), (folder / f"{name}.bin").read_bytes()
    data = change(saved, data) or data
    (tmp_path / f"{name}.json").write_text(json.dumps(saved))
    (tmp_path / f"{name}.bin").write_bytes(data)
    return epath.Path(tmp_path)


class Hostile:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


HOSTILE = pickle.dumps(Hostile())


def consistent(saved, data):
    """Of another program, with a checksum of its own: the facts are compared first."""
    saved["facts"]["the step"] = "0"
    saved["sha256"], saved["size"] = hashlib.sha256(HOSTILE).hexdigest(), len(HOSTILE)
    return HOSTILE


CHANGES = [
    (lambda saved, data: HOSTILE, "has not the checksum"),
    (lambda saved, data: data[:-1] + bytes([data[-1] ^ 1]), "has not the checksum"),
    (lambda saved, data: data + b"0", "more than the"),
    (consistent, "of another step: the kernels chosen here, the code or"),
    (lambda saved, data: saved["facts"].update(jax="0.1"), "jax ('0.1' there, '"),
    (lambda saved, data: saved.update(size=-1), "size is -1"),
    (lambda saved, data: saved.pop("facts") and None, "no 'facts'"),
]


@pytest.mark.parametrize("change, said", CHANGES)
def test_what_does_not_belong_to_it_is_not_unpickled(folder, tmp_path, monkeypatch, capfd, change, said):
    p = small.program(rotations(), 2)
    monkeypatch.setattr(compiler.serialize_executable, "deserialize_and_load", lambda *a: pytest.fail("unpickled"))
    assert compiler.load_executable(copied(folder, tmp_path, change), 0, lowered(p), p) is None
    told = capfd.readouterr().out
    assert told.startswith("compiling, since ") and said in told and told.count("\n") == 1, told


def test_the_line_says_what_differs(folder, capfd, tmp_path):
    for fields, devices, said in (
        (dict(optim__clip=3.0), 2, "config.optim.clip (1.0 there, 3.0 here)"),
        ({}, 1, "the devices ('2 x cpu' there, '1 x cpu' here)"),
    ):
        p = small.program(rotations(**fields), devices)
        assert compiler.load_executable(folder, 0, lowered(p), p) is None and said in capfd.readouterr().out
    refused("aot --save", compiler.saved_in, str(tmp_path))


def test_options_are_the_row_of_the_chip(monkeypatch):
    """A TPU without a row has an empty set of options; for CPUs and GPUs there is none."""

    def options(setting, kind="TPU v99", platform="tpu"):
        return compiler.options(setting, SimpleNamespace(platform=platform, device_kind=kind))

    for chip in chips.CHIPS.values():
        assert options("auto", chip.kind) == dict(chip.compiler_options)
    monkeypatch.setattr(chips, "CHIPS", {"one": chip._replace(compiler_options=(("a", "1"),))})
    found = [options(setting, chip.kind) for setting in ("auto", "b=2", "")]
    assert found == [{"a": "1"}, {"b": "2"}, {}] and options("auto") == {}
    for setting in ("auto", "", "xla_tpu_rwb_fusion=false"):
        assert options(setting, "any", "cpu") is None and options(setting, "any", "gpu") is None


def test_the_compiler_runs_in_a_thread_so_that_signals_end_commands():
    assert compiler.compiled(SimpleNamespace(compile=threading.get_ident)) != threading.get_ident()


def test_the_form_of_options():
    assert compiler.parse("") == {} and compiler.parse("a=1, b=false") == {"a": "1", "b": "false"}
    for bad in ("a", "a=", "=1", "a=1,", "a=1=2", "a=1,a=2", ","):
        refused("config.compiler_options=.*NAME=VALUE", config.validate, small.diva_config(compiler_options=bad), 1)


def test_the_step_is_jitted_with_them(monkeypatch):
    program, given = small.program(small.diva_config(compiler_options="a=1"), 8), []
    monkeypatch.setattr(compiler, "options", lambda setting, device: given.append((setting, device)) or {"b": "2"})
    monkeypatch.setattr(step.jax, "jit", lambda fn, **kw: kw)
    assert program.step(0).jitted["compiler_options"] == {"b": "2"}
    assert given == [("a=1", program.mesh.devices.flat[0])]


def test_what_the_compiler_refuses_is_one_sentence():
    lowered = jax.jit(lambda x: x + 1, compiler_options={"nonsense": "1"}).lower(jnp.zeros(2))
    refused("does not accept nonsense", compiler.compiled, lowered)
    assert compiler.compiled(jax.jit(lambda x: x + 1).lower(jnp.zeros(2)))(jnp.zeros(2)).tolist() == [1, 1]
