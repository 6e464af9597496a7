"""What importing the package costs, and code that a workdir names, which is not executed unless it is known already."""

import importlib
import json
import subprocess
import sys

import pytest
from places import ROOT

import diva_jax
from diva_jax.common import config_files, errors
from diva_jax.common.errors import UserError
from diva_jax.report import page
from diva_jax.training import workdirs


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A folder on the path whose module leaves a file when it is executed."""
    monkeypatch.setattr(config_files, "_trusted", set())
    monkeypatch.setattr(config_files, "_trusts_all", False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    return tmp_path / "foreign"


@pytest.mark.parametrize("config", [
    {"objective": "foreign.evil"},
    {"objective": "diva", "diffusion": {"vae": {"_class_name": "foreign.evil.Code"}}},
    {"objective": "genhancer", "genhancer": {"vae": {"code": "foreign.evil.Code"}}},
])  # fmt: skip
def test_a_workdir_executes_nothing(workdir, config, monkeypatch):
    (workdir / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="names the module 'foreign.evil', which would be executed.*--trust_objective"):
        workdirs.read_config(workdir)
    assert page._defaults(config | {"backbone": {}}) is None or config["objective"] != "foreign.evil"
    assert not (workdir.parent / "executed").exists()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "foreign.evil", config_files)
        assert workdirs.read_config(workdir).to_dict() == config
    config_files.trust(config)
    assert workdirs.read_config(workdir).to_dict() == config
    config_files._trusted.clear()
    config_files.trust()
    assert workdirs.read_config(workdir).to_dict() == config


def test_names_that_are_no_paths_and_those_of_the_package(workdir):
    vae = {"_class_name": "AutoencoderKL", "code": "diva_jax.world.patch_code.PatchCodeConfig", "file": "a.b"}
    config_files.check_stored({"objective": "diva_jax.world.objectives.clip", "diffusion": {"vae": vae}}, "w")


@pytest.mark.parametrize("named", ["installed_package.objective", "installed_module"])
def test_an_error_in_an_installed_module_that_a_config_names_shows_its_line(tmp_path, monkeypatch, named):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(errors.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(errors, "named_by_configs", set())
    monkeypatch.setattr(config_files, "named_by_configs", errors.named_by_configs)
    file = tmp_path.joinpath(*named.split(".")).with_suffix(".py")
    file.parent.mkdir(exist_ok=True)
    file.write_text("def loss():\n    return 1 / 0\n")
    (tmp_path / "a_library.py").write_text("def loss():\n    return 1 / 0\n")
    found = [config_files.module(named, "objective", "give another"), importlib.import_module("a_library")]
    del sys.modules["a_library"]
    for module, where in zip(found, (f"{file}:2", ""), strict=True):
        with pytest.raises(ZeroDivisionError) as caught:
            module.loss()
        caught.value.__traceback__ = caught.tb.tb_next
        assert errors.place(caught.value) == where


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_imports_nothing():
    code = "import sys; before = set(sys.modules); import diva_jax; dir(diva_jax); print(*set(sys.modules) - before)"
    assert {name for name in run(code).split() if name.split(".")[0] not in sys.stdlib_module_names} == {"diva_jax"}


def test_a_command_imports_only_what_every_run_needs():
    """Each of these takes 50 to 500 ms to import, and is needed for some devices, data or loggers alone."""
    code = "import sys, diva_jax.main, diva_jax.training.loop; print(*sys.modules)"
    found = set(run(code).split())
    slow = ("jax.experimental.pallas.tpu", "pyarrow", "ftfy", "transformers", "tensorboardX", "torch", "tensorflow")
    assert "orbax.checkpoint" in found and not found & set(slow)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        diva_jax.lode  # noqa: B018
    assert set(diva_jax.__all__) <= set(dir(diva_jax))


def test_commands_are_functions_whatever_was_imported_before():
    code = """
import diva_jax.training.loop, diva_jax.weights.export.publish, diva_jax
from diva_jax import export, train
assert export is diva_jax.api.export is diva_jax.export and train is diva_jax.api.train is diva_jax.train
try:
    export("nowhere", "out")
except diva_jax.common.errors.UserError as e:
    print(e)
"""
    assert "nowhere" in run(code)
