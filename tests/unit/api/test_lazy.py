"""`import diva_jax` takes no time, and offers the same whatever was imported before."""

import subprocess
import sys

import pytest
from places import ROOT

import diva_jax


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
import diva_jax.training.loop, diva_jax.weights.export.cards, diva_jax
from diva_jax import export, train
assert export is diva_jax.api.export is diva_jax.export and train is diva_jax.api.train is diva_jax.train
try:
    export("nowhere", "out")
except diva_jax.common.errors.UserError as e:
    print(e)
"""
    assert "nowhere" in run(code)
