"""Config files beside weights, changed by field and by byte: refused in one sentence, or a possible model."""

import copy
import dataclasses
import json

import numpy as np
import pytest
from mutations import changed, damaged
from specs import DINOV2, DINOV2_REG, METACLIP2, QUICK, SIGLIP

from diva_jax.common.errors import UserError
from diva_jax.models import backbones
from diva_jax.models.backbones import TABLE
from diva_jax.models.backbones.shared.open_clip_config import from_open_clip, to_open_clip
from diva_jax.models.diffusion import presets, schedule
from diva_jax.models.diffusion.text_encoder import TextEncoderConfig
from diva_jax.models.diffusion.unet import UNetConfig
from diva_jax.models.diffusion.vae import FluxVAEConfig, VAEConfig
from diva_jax.weights import hf, loading, readers

pytestmark = pytest.mark.attack

CASES = 60
SD = presets.preset("sd21_base")


def attacked(parse, content, seed: int, cases: int = CASES) -> list:
    """What `parse` gives for changed content; a UserError of one short line is the only other outcome."""
    rng, accepted = np.random.default_rng(seed), []
    for _ in range(cases):
        tree, what = changed(rng, content, int(rng.integers(1, 4)))
        before = copy.deepcopy(tree)
        try:
            accepted.append(parse(tree))
        except UserError as e:
            assert "\n" not in str(e).strip() and len(str(e)) < 2000, what
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


PREPROCESSOR = hf.image_processor(QUICK)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spec", [QUICK, SIGLIP, METACLIP2, DINOV2, DINOV2_REG], ids=lambda s: s.arch)
def test_transformers_configs(spec, seed):
    config = hf.to_transformers(spec, "float32")
    for found, _ in attacked(lambda c: hf.from_transformers(c, PREPROCESSOR, "a"), config, seed):
        possible(found)
    for found, _ in attacked(lambda p: hf.from_transformers(config, p, "a"), PREPROCESSOR, seed, 25):
        possible(found)


@pytest.mark.parametrize("size", [2**31, 10**9, 10**30])
@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size", "image_size", "intermediate_size"])
def test_absurd_sizes_are_named(field, size):
    config = hf.to_transformers(QUICK, "float32")
    for section in ("vision_config", "text_config"):
        if field in config[section]:
            wrong = copy.deepcopy(config)
            wrong[section][field] = size
            with pytest.raises(UserError, match=f"{size}|{field}"):
                hf.from_transformers(wrong, {}, "a")


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
        try:
            possible(backbones.check(from_open_clip(readers.read_json(path)), str(path)))
        except UserError as e:
            assert "\n" not in str(e).strip() and len(str(e)) < 2000


@pytest.mark.parametrize("seed", range(3))
def test_a_generator_of_another_schedule(tmp_path, seed):
    """The source's own file is compared with the config, so that a generator never gets another one's noise."""
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.parent.mkdir()
    config = schedule.ScheduleConfig.from_dict(SD["scheduler"])

    def parse(tree):
        path.write_text(json.dumps(tree))
        loading.check_schedule(tmp_path, config)
        return schedule.ScheduleConfig.from_dict(tree)

    assert set(attacked(parse, SD["scheduler"], seed)) <= {config}
    path.unlink()
    loading.check_schedule(tmp_path, config)
