"""Weights and the configs beside them, made to do harm: refused in one sentence, within bounded memory."""

import copy
import dataclasses
import json
import os
import zipfile
from pathlib import Path

import archives
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import trees
from flax import nnx
from helpers import refused
from mutations import changed, outcome
from specs import DINOV2, DINOV2_REG, METACLIP2, QUICK, SIGLIP

from diva_jax.models import backbones
from diva_jax.models.backbones.shared.open_clip_config import from_open_clip, to_open_clip
from diva_jax.models.diffusion import presets, schedule
from diva_jax.models.diffusion.text_encoder import TextEncoderConfig
from diva_jax.models.diffusion.unet import UNetConfig
from diva_jax.models.diffusion.vae import FluxVAEConfig, VAEConfig
from diva_jax.weights import formats, names, parts

pytestmark = pytest.mark.attack

SEEDS = range(8)


def read_all(path) -> dict[str, np.ndarray]:
    return {n: np.array(t) for n, t in formats.open_file(path).items()}


def test_archives_that_unpack_to_much_more_torchscript_pipes_and_devices(tmp_path):
    content = archives.state_dict({"w": archives.tensor("0", 10, 0, [10], [1])})
    refused("declare", read_all, archives.write(tmp_path / "a.pt", content, {"0": bytes(2**29)}, zipfile.ZIP_DEFLATED))
    packed = archives.write(tmp_path / "b.pt", content + bytes(2**27), {}, zipfile.ZIP_DEFLATED)
    refused("in a pickle", read_all, packed)
    data = bytearray(archives.write(tmp_path / "c.pt", content, {"0": bytes(40)}).read_bytes())
    data[data.rindex(b"a/data/0") - 22 : data.rindex(b"a/data/0") - 18] = (2**31).to_bytes(4, "little")
    (tmp_path / "c.pt").write_bytes(data)
    refused("declare", read_all, tmp_path / "c.pt")
    with zipfile.ZipFile(archives.write(tmp_path / "ViT-L-14.pt", b"", {}), "a") as archive:
        archive.writestr("a/code/__torch__.py", "")
    says = r"hf-hub:timm/vit_large_patch14_clip_224.openai.*torch.save\(torch.jit.load\("
    refused(says, read_all, tmp_path / "ViT-L-14.pt")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        refused("not a regular file", read_all, tmp_path / name)


INDEXES = json.loads(Path(__file__).with_name("indexes.json").read_text())


@pytest.mark.parametrize("index", INDEXES)
def test_an_index_names_files_of_its_own_folder_alone(tmp_path, index):
    trees.change(tmp_path, {"secret": "what nobody may read", "model/m.safetensors.index.json": json.dumps(index)})
    assert "nobody" not in refused(".", formats.weights_in, tmp_path / "model", "m")


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
    given = ("w", -np.zeros_like(array), "the file")
    refused("the tensor w is zero everywhere", names.check_values, *given, may_be_zero=False)
    bad = np.array(array)
    bad.flat[rng.integers(bad.size)] = rng.choice([np.nan, np.inf, -np.inf, -np.nan])
    refused("the tensor w has values that are NaN or infinite", names.check_values, "w", bad, "the file")
    names.check_values("w", np.full(shape, ml_dtypes.finfo(dtype).max, dtype), "the file")


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.bool_, np.complex64, ml_dtypes.float8_e4m3fn])
def test_weights_that_are_no_floats_or_overflow_are_named(dtype):
    content = {"weight": np.ones((3, 5), dtype), "bias": np.ones(3, np.float32)}
    refused("the tensor weight is of type", names.assign, linear(), content, names.Table("linear"))
    content = {"weight": np.full((3, 5), 1e300), "bias": np.ones(3)}
    with np.errstate(over="ignore"):
        refused("the tensor weight has values that are NaN", names.assign, linear(), content, names.Table("linear"))


SD, CASES = json.loads(json.dumps(presets.preset("sd21_base"))), 60
PREPROCESSOR = names.transformers_configs(QUICK)[1]


def possible(spec) -> None:
    """Fields are of the types and sizes of a model that could be built, and finite."""
    assert backbones.check(spec, "") is spec
    for tower in (spec, spec.text):
        for field, value in vars(tower).items():
            default = getattr(backbones.TABLE["vitl14"] if tower is spec else backbones.TABLE["vitl14"].text, field)
            assert isinstance(value, int | float if isinstance(default, float) else type(default)), (field, value)
    assert np.isfinite([*spec.mean, *spec.std, spec.norm_eps]).all() and min(spec.std) > 0
    assert spec.width % spec.heads == 0 and max(spec.width, spec.mlp_dim, spec.text.vocab_size) <= 2**24


def buildable(options) -> None:
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            assert field.name == "sample_size" or number is None or isinstance(number, str) or abs(number) <= 2**20


def falling(left) -> None:
    """A schedule has less signal at each step, none of it negative."""
    assert np.isfinite(left).all() and (left >= 0).all() and (left < 1).all() and (np.diff(left) <= 0).all()


def of_transformers(config, preprocessor=PREPROCESSOR):
    return names.from_transformers(config, preprocessor, "a")[0]


# What parses a config, the config, and what holds for whatever is accepted.
PARSERS = {
    "preprocessor": (lambda p: of_transformers(names.transformers_configs(QUICK)[0], p), PREPROCESSOR, possible),
    "unet": (UNetConfig.from_dict, SD["unet"], buildable),
    "vae": (VAEConfig.from_dict, SD["vae"], buildable),
    "flux_vae": (FluxVAEConfig.from_dict, SD["vae"] | {"shift_factor": 0.1159}, buildable),
    "text_encoder": (TextEncoderConfig.from_dict, SD["text_encoder"], buildable),
    "schedule": (lambda c: schedule.alphas_cumprod(schedule.ScheduleConfig.from_dict(c)), SD["scheduler"], falling),
}
for number, each in enumerate((QUICK, SIGLIP, METACLIP2, DINOV2, DINOV2_REG)):
    PARSERS[f"transformers {number}"] = of_transformers, names.transformers_configs(each)[0], possible
for number, each in enumerate((QUICK, backbones.TABLE["siglip_so400m"], METACLIP2)):
    PARSERS[f"open_clip {number}"] = (lambda c: backbones.check(from_open_clip(c), "a")), to_open_clip(each), possible


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", PARSERS)
def test_changed_configs(name, seed):
    """Refused in one short line, or accepted and possible; what was given is not changed."""
    (parse, content, check), rng, accepted = PARSERS[name], np.random.default_rng(seed), 0
    for _ in range(CASES):
        tree, what = changed(rng, content, int(rng.integers(1, 4)))
        before = copy.deepcopy(tree)
        for found in outcome(lambda tree=tree: (parse(tree),)) or ():
            check(found)
            accepted += 1
        assert repr(tree) == repr(before), what
    assert accepted < CASES


@pytest.mark.parametrize("seed", range(3))
def test_a_generator_of_another_schedule(tmp_path, seed):
    """The source's own file is compared with the config, so that a generator never gets another one's noise."""
    path, rng = tmp_path / "scheduler" / "scheduler_config.json", np.random.default_rng(seed)
    path.parent.mkdir()
    config = schedule.ScheduleConfig.from_dict(SD["scheduler"])
    for _ in range(CASES):
        tree, _ = changed(rng, SD["scheduler"], int(rng.integers(1, 4)))
        path.write_text(json.dumps(tree))
        if outcome(lambda: (parts.check_schedule(tmp_path, config),)):
            assert schedule.ScheduleConfig.from_dict(tree) == config
    path.unlink()
    parts.check_schedule(tmp_path, config)
