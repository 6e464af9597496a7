"""Files that are invalid, hostile or of another format are refused in one sentence."""

import os
import pickle
import sys

import archives
import helpers
import mutations
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diva_jax.weights import formats


def read_all(path):
    return {n: np.asarray(t) for n, t in formats.open_file(path).items()}


def refused(path, match):
    assert str(path) in helpers.refused(match, read_all, path)


CONTENT = {"a.weight": torch.arange(600.0).reshape(20, 30), "b": torch.tensor(3.0)}
CONTENT |= {"half": torch.arange(7.0).half(), "wide": torch.eye(3, dtype=torch.float64)}


def write(kind, path):
    if kind == "safetensors":
        save_file(CONTENT, path)
    else:
        torch.save(CONTENT, path, _use_new_zipfile_serialization=kind == "zip")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "old pickle"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_files(tmp_path, kind, share):
    path = tmp_path / "weights.bin"
    write(kind, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused(path, "fetch the file again")


def test_no_value_comes_from_outside_the_file(tmp_path):
    """Whatever a zip says of its tensors: it is refused, or all values are those of the storage."""
    good = {"key": "0", "count": 15, "offset": 0, "shape": [3, 5], "strides": [5, 1]}
    numbers = [-1, -(2**40), 2**31, 2**62, 2**70, 0.5, float("nan"), "x"]
    cases = [{field: n} for field in ("count", "offset") for n in (*numbers, 3, 14, 16)]
    cases += [{field: [n, 5]} for field in ("shape", "strides") for n in (*numbers, 500)]
    cases += [{"shape": [2**20] * 2, "strides": [0, 0]}, {"shape": [3] * 40, "strides": [1] * 40}]
    cases += [{"key": key} for key in ("1", "../0", "0/../../x", "", "0\0")]
    data = np.arange(15, dtype=np.float32).tobytes()
    refusals = 0
    for i, wrong in enumerate(cases):
        pickled = archives.state_dict({"w": archives.tensor(**good | wrong)})
        path = archives.write(tmp_path / f"{i}.pt", pickled, {"0": data})
        found = mutations.outcome(lambda path=path: read_all(path), path)
        refusals += found is None
        assert found is None or set(found["w"].ravel().tolist()) <= set(range(15)), wrong
    assert refusals > 35


@pytest.mark.attack
@pytest.mark.parametrize("kind", ["safetensors", "zip"])
@pytest.mark.parametrize("seed", range(8))
def test_changed_bytes(tmp_path, seed, kind):
    """A few changes of bytes anywhere: refused, or read as arrays of the same size."""
    write(kind, tmp_path / "good")
    data, rng = (tmp_path / "good").read_bytes(), np.random.default_rng(seed)
    for case in range(25):
        path = tmp_path / f"{case}"
        path.write_bytes(mutations.damaged(rng, data, most=3))
        found = mutations.outcome(lambda path=path: read_all(path), path)
        assert found is None or sum(a.nbytes for a in found.values()) <= path.stat().st_size


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_refused_unrun(tmp_path):
    torch.save({"a": CONTENT["b"], "bomb": Bomb(tmp_path / "ran")}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "could run any code: save only its state_dict")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    refused(tmp_path / "b.pt", "fetch the file again|could run any code")
    assert not (tmp_path / "ran").exists()


def test_files_of_another_kind(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(path, "git lfs pull")
    path.write_text("<!DOCTYPE html><html>Not found</html>")
    refused(path, "neither safetensors nor a torch file")
    path.write_bytes(b"")
    refused(path, "fetch the file again")
    refused(tmp_path / "nothing.pt", "No such file")
    torch.save({"epoch": 3}, tmp_path / "epoch.pt")
    refused(tmp_path / "epoch.pt", "holds a dict of epoch, where tensors by name are wanted")
    torch.save(torch.nn.Linear(3, 4), tmp_path / "model.pth")
    refused(tmp_path / "model.pth", r"contains objects other than tensors.*state_dict")
    save_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, path)
    refused(path, "give a file of float weights")


def test_torch_is_named_where_it_is_missing(tmp_path, monkeypatch):
    torch.save(CONTENT, tmp_path / "a.pt")
    save_file(CONTENT, tmp_path / "a.safetensors")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert read_all(tmp_path / "a.safetensors").keys() == CONTENT.keys()
    refused(tmp_path / "a.pt", r"needs torch .*: pip install -e '.\[torch\]', or use safetensors")
