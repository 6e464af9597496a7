"""Sources that cannot be used, arrays that are placed on their shards, and files that are written."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import refused
from jax.sharding import NamedSharding, PartitionSpec

from diva_jax.common.errors import UserError
from diva_jax.training import load
from diva_jax.weights import names, origins, places, readers, writers


def read_all(path):
    return {n: np.asarray(t) for n, t in readers.open_file(path).items()}


def test_missing_shard(tmp_path):
    index = {"weight_map": {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    writers.write_safetensors(tmp_path / "m-00001-of-00002.safetensors", {"a": np.float32(3)})
    refused("m-00002-of-00002.safetensors, which is missing", readers.weights_in, tmp_path, "m")
    (tmp_path / "m.safetensors.index.json").write_text("{")
    refused("JSON", readers.weights_in, tmp_path, "m")
    refused("has no weights", readers.weights_in, tmp_path, "other")


def test_the_removed_repository_is_named_and_a_local_folder_of_its_name_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in ("stabilityai/stable-diffusion-2-1-base", "hf-hub:stabilityai/stable-diffusion-2-1"):
        refused(r"removed in November 2025: set config.diffusion.source to a mirror", places.diffusers_folder, source)
    (tmp_path / "stabilityai/stable-diffusion-2-1-base").mkdir(parents=True)
    assert places.diffusers_folder("stabilityai/stable-diffusion-2-1-base").is_dir()


@pytest.mark.parametrize("open_it", [places.diffusers_folder, origins.open_source])
def test_stable_diffusion_in_one_file_is_named_with_its_conversion(tmp_path, open_it):
    file = tmp_path / "v2-1_512-ema-pruned.safetensors"
    writers.write_safetensors(file, {f"model.diffusion_model.input_blocks.{i}.weight": np.ones(2) for i in range(900)})
    refused(rf"in one file: .*from_single_file\('{file}'\).*diffusion.source=stable-diff", open_it, str(file))
    writers.write_safetensors(file, {"other.weight": np.ones(2)})
    refused("is a file: give the diffusers folder|no vision tower", open_it, str(file))


def test_messages_are_cut_to_a_screen_and_end_with_their_advice():
    error = UserError(f"unknown: {'x' * 10**6}: give another file")
    assert len(str(error)) < 1920 and str(error).endswith("x: give another file")


@pytest.mark.parametrize("find", [places.diffusers_folder, origins.open_source])
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


def test_a_mistyped_path_does_not_ask_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places, "download", lambda *_: pytest.fail("the hub was asked"))
    (tmp_path / "weights" / "clip").mkdir(parents=True)
    with pytest.raises(UserError, match="config.x.source='weights/clpi' does not exist in the folder weights"):
        origins.open_source("weights/clpi", "config.x.source")


def test_arrays_go_straight_to_their_shards():
    """Each device has its shard, in the requested dtype, with kernels transposed."""
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
