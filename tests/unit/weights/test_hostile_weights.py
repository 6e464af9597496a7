"""Weights and the configs beside them, made to do harm: refused in one sentence, within bounded memory."""

import copy
import dataclasses
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
from mutations import changed, damaged
from safetensors.numpy import save_file
from specs import DINOV2, DINOV2_REG, METACLIP2, QUICK, SIGLIP

from diva_jax.common.errors import UserError
from diva_jax.models import backbones
from diva_jax.models.backbones import TABLE
from diva_jax.models.backbones.shared.open_clip_config import from_open_clip, to_open_clip
from diva_jax.models.diffusion import presets, schedule
from diva_jax.models.diffusion.unet import TextEncoderConfig, UNetConfig
from diva_jax.models.diffusion.vae import FluxVAEConfig, VAEConfig
from diva_jax.weights import clip, formats, names, parts

pytestmark = pytest.mark.attack

ARRAYS = {
    "weight": np.arange(15, dtype=np.float32).reshape(3, 5),
    "half": np.arange(7, dtype=np.float16),
    "wide": np.arange(6, dtype=np.float64).reshape(2, 3),
}
SEEDS = range(8)


def read_all(path) -> dict[str, np.ndarray]:
    return {n: np.array(t) for n, t in formats.open_file(path).items()}


def refused(path, match: str) -> None:
    with pytest.raises(UserError, match=match):
        read_all(path)


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
        found = mutations.outcome(lambda path=path: read_all(path), path)
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
        formats.weights_in(folder, "m")
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


CASES = 60
SD = presets.preset("sd21_base")


def attacked(parse, content, seed: int, cases: int = CASES) -> list:
    """What `parse` gives for changed content; a UserError of one short line is the only other outcome."""
    rng, accepted = np.random.default_rng(seed), []
    for _ in range(cases):
        tree, what = changed(rng, content, int(rng.integers(1, 4)))
        before = copy.deepcopy(tree)
        found = mutations.outcome(lambda tree=tree: (parse(tree),))
        accepted += found or ()
        assert repr(tree) == repr(before), what
    return accepted


def possible(spec) -> None:
    """Fields are of the types and sizes of a model that could be built, and finite."""
    assert backbones.check(spec, "") is spec
    for tower in (spec, spec.text):
        for field, value in vars(tower).items():
            default = getattr(TABLE["vitl14"] if tower is spec else TABLE["vitl14"].text, field)
            assert isinstance(value, int | float if isinstance(default, float) else type(default)), (field, value)
    assert np.isfinite([*spec.mean, *spec.std, spec.norm_eps]).all() and min(spec.std) > 0
    assert spec.width % spec.heads == 0 and max(spec.width, spec.mlp_dim, spec.text.vocab_size) <= 2**24


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spec", [QUICK, TABLE["siglip_so400m"], METACLIP2], ids=["vit", "siglip", "metaclip2"])
def test_open_clip_configs(spec, seed):
    for found in attacked(lambda c: backbones.check(from_open_clip(c), "a"), to_open_clip(spec), seed):
        possible(found)


PREPROCESSOR = clip.transformers_configs(QUICK)[1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spec", [QUICK, SIGLIP, METACLIP2, DINOV2, DINOV2_REG], ids=lambda s: s.arch)
def test_transformers_configs(spec, seed):
    config = clip.transformers_configs(spec)[0]
    for found, _ in attacked(lambda c: clip.from_transformers(c, PREPROCESSOR, "a"), config, seed):
        possible(found)
    for found, _ in attacked(lambda p: clip.from_transformers(config, p, "a"), PREPROCESSOR, seed, 25):
        possible(found)


@pytest.mark.parametrize("size", [2**31, 10**9, 10**30])
@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size", "image_size", "intermediate_size"])
def test_absurd_sizes_are_named(field, size):
    config = clip.transformers_configs(QUICK)[0]
    for section in ("vision_config", "text_config"):
        if field in config[section]:
            wrong = copy.deepcopy(config)
            wrong[section][field] = size
            with pytest.raises(UserError, match=f"{size}|{field}"):
                clip.from_transformers(wrong, {}, "a")


PARTS = {
    "unet": (UNetConfig, SD["unet"]),
    "vae": (VAEConfig, SD["vae"]),
    "text_encoder": (TextEncoderConfig, SD["text_encoder"]),
    "flux_vae": (FluxVAEConfig, SD["vae"] | {"shift_factor": 0.1159}),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("part", PARTS)
def test_diffusers_configs(part, seed):
    kind, content = PARTS[part]
    assert len(attacked(kind.from_dict, json.loads(json.dumps(content)), seed)) < CASES
    for found in attacked(kind.from_dict, json.loads(json.dumps(content)), seed):
        for field in dataclasses.fields(found):
            value = getattr(found, field.name)
            if field.name != "sample_size":
                for number in value if isinstance(value, tuple) else (value,):
                    assert number is None or isinstance(number, str) or abs(number) <= 2**20, field.name


@pytest.mark.parametrize("seed", range(6))
def test_schedules(seed):
    """Whatever is accepted is a schedule: less signal at each step, none of it negative."""
    accepted = attacked(lambda c: schedule.alphas_cumprod(schedule.ScheduleConfig.from_dict(c)), SD["scheduler"], seed)
    for abar in accepted:
        assert np.isfinite(abar).all() and (abar >= 0).all() and (abar < 1).all() and (np.diff(abar) <= 0).all()


@pytest.mark.parametrize("seed", range(4))
def test_changed_bytes_of_json(tmp_path, seed):
    rng, data = np.random.default_rng(seed), json.dumps(to_open_clip(QUICK)).encode()
    for case in range(40):
        path = tmp_path / f"{case}.json"
        path.write_bytes(damaged(rng, data))
        read = lambda path=path: backbones.check(from_open_clip(formats.read_json(path)), str(path))  # noqa: E731
        if found := mutations.outcome(read):
            possible(found)


@pytest.mark.parametrize("seed", range(3))
def test_a_generator_of_another_schedule(tmp_path, seed):
    """The source's own file is compared with the config, so that a generator never gets another one's noise."""
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.parent.mkdir()
    config = schedule.ScheduleConfig.from_dict(SD["scheduler"])

    def parse(tree):
        path.write_text(json.dumps(tree))
        parts.check_schedule(tmp_path, config)
        return schedule.ScheduleConfig.from_dict(tree)

    assert set(attacked(parse, SD["scheduler"], seed)) <= {config}
    path.unlink()
    parts.check_schedule(tmp_path, config)
