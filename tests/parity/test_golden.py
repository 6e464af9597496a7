"""Recorded results of the authors' code against our modules."""

import sys

import commands
import numpy as np
import pytest
from places import TESTS

HERE = TESTS / "golden"
SD = HERE / "sd_tiny_7.npz"
sys.path.insert(0, str(HERE))
import check  # noqa: E402


@pytest.mark.parametrize("name", ["OpenAICLIP_224", "MetaCLIP_224", "DFN_378", "SigLIP_224"])
def test_golden_file(name):
    path = HERE / f"{name}.npz"
    rows = check.errors(path, SD)
    assert {r[0].split("/")[0] for r in rows} == set(check.method_of(path).BOUNDS)
    assert [r for r in rows if not r[1] <= r[2]] == []


@pytest.mark.parametrize("name", ["unclip_a"])
def test_golden_file_of_the_family(name):
    path = HERE / "family" / f"{name}.npz"
    method, rows = check.method_of(path), check.errors(path, SD)
    assert {method.quantity(r[0]) for r in rows} == set(method.BOUNDS)
    assert [r for r in rows if not r[1] <= r[2]] == []


def test_command_fails_past_the_bound(tmp_path):
    """A LayerNorm weight that differs by 1e-4 is detected; the exit code is 1."""
    z = dict(np.load(HERE / "MetaCLIP_224.npz"))
    z["w/visual.ln_post.weight"] = z["w/visual.ln_post.weight"] * np.float32(1.0001)
    np.savez(tmp_path / "MetaCLIP_224.npz", **z)
    check_script = commands.launch(sys.executable, HERE / "check.py", tmp_path / "MetaCLIP_224.npz", SD)
    code, out, err = commands.finish(check_script)
    assert code == 1, err
    assert "PAST THE BOUND" in out and "features/0" in out
