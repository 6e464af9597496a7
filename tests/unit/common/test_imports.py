"""Code that a workdir names is not executed, unless a config file, the user or the process already has it."""

import json
import sys

import pytest

from diva_jax.common import imports
from diva_jax.common.errors import UserError
from diva_jax.report import about
from diva_jax.training import workdirs


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A folder on the path whose module leaves a file when it is executed."""
    monkeypatch.setattr(imports, "_trusted", set())
    monkeypatch.setattr(imports, "_trusts_all", False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    return tmp_path / "foreign"


@pytest.mark.parametrize(
    "config",
    [
        {"objective": "foreign.evil"},
        {"objective": "diva", "diffusion": {"vae": {"_class_name": "foreign.evil.Code"}}},
        {"objective": "genhancer", "genhancer": {"vae": {"code": "foreign.evil.Code"}}},
    ],
)
def test_a_workdir_executes_nothing(workdir, config, monkeypatch):
    (workdir / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="names the module 'foreign.evil', which would be executed.*--trust_objective"):
        workdirs.read_config(workdir)
    assert about._defaults(config | {"backbone": {}}) is None or config["objective"] != "foreign.evil"
    assert not (workdir.parent / "executed").exists()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "foreign.evil", imports)
        assert workdirs.read_config(workdir).to_dict() == config
    imports.trust(config)
    assert workdirs.read_config(workdir).to_dict() == config
    imports._trusted.clear()
    imports.trust()
    assert workdirs.read_config(workdir).to_dict() == config


def test_names_that_are_no_paths_and_those_of_the_package(workdir):
    vae = {"_class_name": "AutoencoderKL", "code": "diva_jax.world.patch_code.PatchCodeConfig", "file": "a.b"}
    imports.check_stored({"objective": "diva_jax.world.objectives.clip", "diffusion": {"vae": vae}}, "w")
