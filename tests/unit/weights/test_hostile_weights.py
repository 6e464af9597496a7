"""Files of weights whose contents were made to do harm: refused in one sentence, within bounded memory."""

import json
import os
import zipfile

import archives
import jax.numpy as jnp
import ml_dtypes
import mutations
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from diva_jax.common.errors import UserError
from diva_jax.weights import names, readers

pytestmark = pytest.mark.attack

ARRAYS = {
    "weight": np.arange(15, dtype=np.float32).reshape(3, 5),
    "half": np.arange(7, dtype=np.float16),
    "wide": np.arange(6, dtype=np.float64).reshape(2, 3),
}
SEEDS = range(8)


def outcome(path) -> dict[str, np.ndarray] | None:
    """What a file holds, or None where it is refused; any other exception fails the test."""
    try:
        return {n: np.array(t) for n, t in readers.open_file(path).items()}
    except UserError as e:
        assert "\n" not in str(e) and str(path) in str(e)
        return None


def refused(path, match: str) -> None:
    with pytest.raises(UserError, match=match):
        _ = {n: np.array(t) for n, t in readers.open_file(path).items()}


@pytest.mark.parametrize("seed", SEEDS)
def test_changed_bytes(tmp_path, seed):
    """A few changes of bytes anywhere: refused, or read as arrays of the same size."""
    good = tmp_path / "good"
    save_file(ARRAYS, good)
    data, rng = good.read_bytes(), np.random.default_rng(seed)
    for case in range(25):
        changed = mutations.damaged(rng, data, most=3)
        path = tmp_path / f"{case}"
        path.write_bytes(changed)
        found = outcome(path)
        assert found is None or sum(a.nbytes for a in found.values()) <= len(changed)


def test_archives_that_unpack_to_much_more(tmp_path):
    content = archives.state_dict({"w": archives.tensor("0", 10, 0, [10], [1])})
    refused(archives.write(tmp_path / "a.pt", content, {"0": bytes(2**29)}, zipfile.ZIP_DEFLATED), "declare")
    refused(archives.write(tmp_path / "b.pt", content + bytes(2**27), {}, zipfile.ZIP_DEFLATED), "in a pickle")
    data = bytearray(archives.write(tmp_path / "c.pt", content, {"0": bytes(40)}).read_bytes())
    data[data.rindex(b"a/data/0") - 22 : data.rindex(b"a/data/0") - 18] = (2**31).to_bytes(4, "little")
    (tmp_path / "c.pt").write_bytes(data)
    refused(tmp_path / "c.pt", "declare")


def test_torchscript_is_refused_with_the_way_to_convert_it(tmp_path):
    """Not opened, whatever is in it; torch is not needed to say so."""
    with zipfile.ZipFile(archives.write(tmp_path / "ViT-L-14.pt", b"", {}), "a") as archive:
        archive.writestr("a/code/__torch__.py", "")
    refused(tmp_path / "ViT-L-14.pt", r"hf-hub:timm/vit_large_patch14_clip_224.openai.*torch.save\(torch.jit.load\(")


INDEXES = [
    [],
    {},
    {"weight_map": []},
    {"weight_map": {}},
    {"weight_map": {"a": 3}},
    {"weight_map": {"a": None}},
    *({"weight_map": {"a": p}} for p in ("../secret", "/etc/passwd", "", ".", "..", "a/b", "a\\b", "~", "x\0")),
    {"weight_map": {"a": "m" * 5000}},
]


@pytest.mark.parametrize("index", INDEXES)
def test_an_index_names_files_of_its_own_folder_alone(tmp_path, index):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"what nobody may read")
    (folder / "m.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as e:
        readers.weights_in(folder, "m")
    assert "nobody" not in str(e.value)


def test_pipes_and_devices_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        refused(tmp_path / name, "not a regular file")


def linear() -> nnx.Module:
    return nnx.eval_shape(lambda: nnx.Linear(5, 3, rngs=nnx.Rngs(0), param_dtype=jnp.float32))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("seed", SEEDS)
def test_values_that_are_not_finite_are_found_wherever_they_are(dtype, seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 60, rng.integers(1, 4)))
    array = rng.normal(size=shape).astype(dtype)
    array = array.T if rng.integers(2) else array
    names.check_values("w", array, "the file")
    names.check_values("w", np.zeros_like(array), "the file")
    with pytest.raises(UserError, match="the tensor w is zero everywhere"):
        names.check_values("w", -np.zeros_like(array), "the file", may_be_zero=False)
    bad = np.array(array)
    bad.flat[rng.integers(bad.size)] = rng.choice([np.nan, np.inf, -np.inf, -np.nan])
    with pytest.raises(UserError, match="the tensor w has values that are NaN or infinite"):
        names.check_values("w", bad, "the file")
    largest = np.full(shape, ml_dtypes.finfo(dtype).max, dtype)
    names.check_values("w", largest, "the file")


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.bool_, np.complex64, ml_dtypes.float8_e4m3fn])
def test_weights_that_are_no_floats_are_named(dtype):
    content = {"weight": np.ones((3, 5), dtype), "bias": np.ones(3, np.float32)}
    with pytest.raises(UserError, match=r"the tensor weight is of type"):
        names.assign(linear(), content, names.Table("linear"))


def test_a_tensor_that_overflows_in_the_dtype_asked_for():
    content = {"weight": np.full((3, 5), 1e300), "bias": np.ones(3)}
    with np.errstate(over="ignore"), pytest.raises(UserError, match="the tensor weight has values that are NaN or inf"):
        names.assign(linear(), content, names.Table("linear"))
