"""The authors' own numbers, through the modules that train."""

import subprocess
import sys

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
    """A LayerNorm weight off by a ten-thousandth is seen, and the exit code says so."""
    z = dict(np.load(HERE / "MetaCLIP_224.npz"))
    z["w/visual.ln_post.weight"] = z["w/visual.ln_post.weight"] * np.float32(1.0001)
    np.savez(tmp_path / "MetaCLIP_224.npz", **z)
    done = subprocess.run(
        [sys.executable, HERE / "check.py", tmp_path / "MetaCLIP_224.npz", SD], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert "PAST THE BOUND" in done.stdout and "features/0" in done.stdout
