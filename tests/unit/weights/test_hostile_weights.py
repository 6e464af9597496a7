"""Files of weights whose contents were made to do harm: refused in one sentence, within bounded memory."""

import json
import os
import pickle
import resource
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


def test_what_is_right_is_read(tmp_path):
    found = outcome(archives.write(tmp_path / "a.pt", *archives.dense(ARRAYS)))
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)


def _wild(rng, field: str, good):
    """A wrong number in place of `good`."""
    extreme = [-1, -(2**40), 2**31, 2**62, 2**70, 10**9, 0.5, float("nan"), "x"]
    near = [] if isinstance(good, list) else [good + 1, good - 1, good + int(rng.integers(1, 1000))]
    one = lambda: (near + extreme)[rng.integers(len(near + extreme))]  # noqa: E731
    if not isinstance(good, list):
        return one()
    changed = list(good)
    if rng.integers(4) == 0:
        return changed + [3] * int(rng.integers(1, 40))
    changed[rng.integers(len(changed))] = [*extreme, 6, 100][rng.integers(len(extreme) + 2)]
    return changed


@pytest.mark.parametrize("field", ["count", "offset", "shape", "strides", "key", "storage"])
@pytest.mark.parametrize("seed", SEEDS)
def test_no_value_comes_from_outside_the_file(tmp_path, field, seed):
    """Whatever a TorchScript archive says of its tensors: it is refused, or all values are those of its storage."""
    rng = np.random.default_rng((seed, len(field)))
    for case in range(12):
        said = {"key": "0", "kind": "FloatStorage", "count": 15, "offset": 0, "shape": [3, 5], "strides": [5, 1]}
        data = ARRAYS["weight"].tobytes()
        if field == "key":
            said["key"] = ["1", "../0", "0/../../x", "", "0\x00"][rng.integers(5)]
        elif field == "storage":
            data = data[: rng.integers(0, 60)]
        else:
            said[field] = _wild(rng, field, said[field])
        found = outcome(
            archives.write(
                tmp_path / f"{case}.pt", archives.pickled(archives.module({"w": archives.tensor(**said)})), {"0": data}
            )
        )
        if found is not None:
            assert set(found["w"].ravel().tolist()) <= set(range(15)), said


@pytest.mark.parametrize("kind", ["archive", "safetensors"])
@pytest.mark.parametrize("seed", SEEDS)
def test_changed_bytes(tmp_path, kind, seed):
    """A few changes of bytes anywhere: refused, or read as arrays of the same size."""
    good = tmp_path / "good"
    archives.write(good, *archives.dense(ARRAYS)) if kind == "archive" else save_file(ARRAYS, good)
    data, rng = good.read_bytes(), np.random.default_rng(seed)
    for case in range(25):
        changed = mutations.damaged(rng, data, most=3)
        path = tmp_path / f"{case}"
        path.write_bytes(changed)
        found = outcome(path)
        assert found is None or sum(a.nbytes for a in found.values()) <= len(changed)


def test_pickles_that_need_much_memory_or_never_end(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cases = {
        "memo": b"\x80\x02}r\xff\xff\xff\x7f.",
        "object of number": b"\x80\x02}p2000000000\n.",
    }
    for i, data in enumerate(cases.values()):
        assert outcome(archives.write(tmp_path / f"{i}.pt", data, {})) is None
    # Each module has the next one twice: 2^60 paths, in a file of a few kilobytes.
    inner = archives.module({})
    for i in range(60):
        inner = archives.module({"a": inner + b"q" + bytes([i]), "b": b"h" + bytes([i])})
    refused(archives.write(tmp_path / "twice.pt", archives.pickled(inner), {}), "nested without end")
    inner = archives.module({})
    for _ in range(3000):
        inner = archives.module({"a": inner})
    refused(archives.write(tmp_path / "deep.pt", archives.pickled(inner), {}), "nested without end|corrupt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # Less than 1 GiB more.


def test_a_module_cannot_change_what_comes_after_it(tmp_path):
    """Attributes set on the class of a module do not outlive the file."""
    data = b"\x80\x02" + b"c__torch__\nM\n" + b"N}(" + archives._text("planted") + b"K\x01u\x86b."
    outcome(archives.write(tmp_path / "a.pt", data, {}))
    from diva_jax.weights import pickles

    assert not hasattr(pickles._Module, "planted")


def test_archives_that_unpack_to_much_more(tmp_path):
    attributes = {"w": archives.tensor("0", "FloatStorage", 10, 0, [10], [1])}
    content = archives.pickled(archives.module(attributes))
    refused(archives.write(tmp_path / "a.pt", content, {"0": bytes(2**29)}, zipfile.ZIP_DEFLATED), "declare")
    refused(archives.write(tmp_path / "b.pt", content + bytes(2**27), {}, zipfile.ZIP_DEFLATED), "at most are allowed")


@pytest.mark.parametrize("seed", SEEDS)
def test_other_calls_than_those_of_tensors(tmp_path, seed):
    """No global of any module is called, whatever its name."""
    rng = np.random.default_rng(seed)
    modules = ["os", "builtins", "posix", "subprocess", "numpy", "torch", "torch._utils", "collections", "diva_jax"]
    targets = ["mkdir", "eval", "exec", "getattr", "system", "Popen", "load", "_rebuild_tensor", "deque", "__import__"]
    for case in range(20):
        module, name = modules[rng.integers(len(modules))], targets[rng.integers(len(targets))]
        call = b"\x80\x02" + f"c{module}\n{name}\n".encode() + b"(" + archives._text(str(tmp_path / "ran")) + b"tR."
        refused(archives.write(tmp_path / f"{case}.pt", call, {}), "which is not part of a CLIP archive")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "p.pt").write_bytes(pickle.dumps(os.getcwd))


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


@pytest.mark.parametrize("text", ["", "[", "[1]", '"x"', "NaN", "{" * 100_000, '{"a":' * 50_000, "\x00", "\ud800"])
def test_broken_json(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match="a.json"):
        readers.read_json(tmp_path / "a.json")


def test_pipes_and_devices_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        refused(tmp_path / name, "not a regular file")
        with pytest.raises(UserError, match="not a regular file"):
            readers.read_json(tmp_path / name)


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
