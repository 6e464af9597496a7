"""Files that are broken, hostile, or not what they seem, and places that are not there: one sentence each."""

import json
import os
import pickle
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.torch import save_file

from diva_jax.common.errors import UserError
from diva_jax.training import load
from diva_jax.weights import names, origins, readers, writers


def read_all(path):
    return {n: np.asarray(t) for n, t in readers.open_file(path).items()}


def refused(path, match):
    with pytest.raises(UserError, match=match) as e:
        read_all(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value).strip()


CONTENT = {"a.weight": torch.arange(600.0).reshape(20, 30), "b": torch.tensor(3.0)}


def jit_archive(path):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(30, 20)
            self.t = torch.nn.Parameter(torch.randn(30, 20).T)  # Not contiguous: strides are in the archive.

        def forward(self, x):
            return self.a(x) + x @ self.t.T

    scripted = torch.jit.script(Module())
    scripted.save(str(path))
    return scripted.state_dict()


def write(kind, path):
    if kind == "safetensors":
        save_file(CONTENT, path)
    elif kind == "jit":
        jit_archive(path)
    else:
        torch.save(CONTENT, path, _use_new_zipfile_serialization=kind == "zip")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "old pickle", "jit"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_files(tmp_path, kind, share):
    path = tmp_path / "weights.bin"
    write(kind, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused(path, "fetch the file again")


def test_jit_archive_with_strides(tmp_path):
    expected = jit_archive(tmp_path / "a.pt")
    found = read_all(tmp_path / "a.pt")
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name].numpy())


def test_jit_archive_with_a_flipped_byte(tmp_path):
    jit_archive(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        member = next(i for i in archive.infolist() if i.filename.endswith("data/0"))
        payload = archive.read(member)
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[data.index(payload) + 5] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    refused(tmp_path / "a.pt", "corrupt")


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
    with zipfile.ZipFile(tmp_path / "c.pt", "w") as archive:
        archive.writestr("c/data.pkl", pickle.dumps(Bomb(tmp_path / "ran"), protocol=2))
        archive.writestr("c/code/__torch__.py", "")
    refused(tmp_path / "c.pt", "mkdir, which is not part of a CLIP archive")
    assert not (tmp_path / "ran").exists()


def test_a_whole_pickled_model_is_refused(tmp_path):
    torch.save(torch.nn.Linear(3, 4), tmp_path / "model.pth")
    refused(tmp_path / "model.pth", r"contains objects other than tensors.*state_dict")


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
    refused(tmp_path / "epoch.pt", "has no state dict")
    save_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, path)
    refused(path, "give a file of float weights")


def test_missing_shard(tmp_path):
    index = {"weight_map": {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": CONTENT["b"]}, tmp_path / "m-00001-of-00002.safetensors")
    with pytest.raises(UserError, match="m-00002-of-00002.safetensors, which is missing"):
        readers.weights_in(tmp_path, "m")
    (tmp_path / "m.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        readers.weights_in(tmp_path, "m")
    with pytest.raises(UserError, match="has no weights"):
        readers.weights_in(tmp_path, "other")


def test_torch_is_named_where_it_is_missing(tmp_path):
    """And a JIT archive or safetensors need none."""
    torch.save(CONTENT, tmp_path / "a.pt")
    save_file(CONTENT, tmp_path / "a.safetensors")
    jit_archive(tmp_path / "jit.pt")
    code = f"""
import sys; sys.modules["torch"] = None
from pathlib import Path
import numpy as np
from diva_jax.common.errors import UserError
from diva_jax.weights import readers
for name in ("a.safetensors", "jit.pt"):
    assert all(np.asarray(t).size for t in readers.open_file(Path({str(tmp_path)!r}) / name).values())
try: readers.open_file(Path({str(tmp_path)!r}) / "a.pt")
except UserError as e: print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "needs torch: pip install 'diva_jax[torch]'" in done.stdout, done.stderr


@pytest.mark.parametrize("source", ["stabilityai/stable-diffusion-2-1-base", "hf-hub:stabilityai/stable-diffusion-2-1"])
def test_the_removed_repository_is_named(source):
    with pytest.raises(UserError, match=r"removed in November 2025: set config.diffusion.source to a mirror"):
        origins.diffusers_folder(source)


def test_a_local_folder_of_the_removed_name_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stabilityai/stable-diffusion-2-1-base").mkdir(parents=True)
    assert origins.diffusers_folder("stabilityai/stable-diffusion-2-1-base").is_dir()


@pytest.mark.parametrize("find", [origins.diffusers_folder, origins.open_clip_source])
def test_places_that_are_not_there(find, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source, match in (
        ("", "is empty"),
        ("no/such/folder", "does not exist"),
        ("local-dir:nothing", "does not exist"),
        ("hf-hub:someone/something", "the hub did not give it"),
        ("someone/something", "the hub did not give it"),
    ):
        with pytest.raises(UserError, match=match) as e:
            find(source, "config.x.source")
        assert "config.x.source" in str(e.value) and len(str(e.value)) < 600


def test_arrays_go_straight_to_their_shards():
    """Each device holds its piece, in the dtype asked for, kernels transposed."""
    model = nnx.eval_shape(lambda: nnx.Linear(16, 24, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    weight, bias = np.arange(24 * 16, dtype=np.float32).reshape(24, 16), np.ones(24, np.float32)
    put = load.put_on(lambda path: NamedSharding(mesh, PartitionSpec("fsdp")))
    state = names.assign(model, {"weight": weight, "bias": bias}, names.Table("linear"), put=put)
    kernel = state["kernel"].get_value()
    assert kernel.dtype == jnp.bfloat16 and {s.data.shape for s in kernel.addressable_shards} == {(2, 24)}
    np.testing.assert_array_equal(np.asarray(kernel, np.float32), weight.T.astype(jnp.bfloat16).astype(np.float32))


def test_writers(tmp_path):
    array = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    content = {"t": array.T, "s": np.float32(3), "b": array.astype(jnp.bfloat16)}
    writers.write_safetensors(tmp_path / "a.safetensors", content)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    found = read_all(tmp_path / "a.safetensors")
    for name, value in content.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].dtype == value.dtype


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), writers.new_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with writers.new_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match="exists already"), writers.new_folder(tmp_path / "out"):
        pass
    with pytest.raises(UserError, match="cannot be written"), writers.new_folder("/proc/nothing/out"):
        pass
