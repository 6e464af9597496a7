"""The files of configs/ have the published values, are valid, and build the models that they name."""

import jax
import pytest
from helpers import refused
from places import ROOT

from diva_jax import config
from diva_jax.common import config_files
from diva_jax.models import backbones
from diva_jax.objectives import diva
from diva_jax.training import partition
from diva_jax.training.step import Program

FILES = sorted((ROOT / "configs").glob("*.py"))
NAMES = [f.stem for f in FILES if not f.stem.startswith("genhancer")] + ["kuea_vitl14:faithful"]
# One of each objective, and of each architecture of a backbone; `make slow` builds all.
BUILT = "custom tiny world vitl14 siglip_so400m_384 dcr_siglip_so400m unclip_h14 judge_vitl14 kuea_vitb16".split()
BUILT += ["kuea_vitl14:faithful", "smartclip_vitl14", "comclip_vitl14", "salm_vitl14"]
# What the objectives train, those without a U-Net and the judge.
OTHERS = {
    "kuea": {"vision", "kernel_params"},
    "smartclip": {"vision", "text", "mask_net"},
    "comclip": {"vision"},
    "salm": {"vision", "adapter"},
    "judge": {"vision"},
}


def load(name: str):
    return config_files.read(ROOT / "configs" / name)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_is_valid(file):
    assert "python -m diva_jax.main --config=configs/" in file.read_text().split('"""')[1]
    c = load(file.name)
    config.validate(c, 1 if file.stem in ("tiny", "world") else 16)  # The others are for a v5e:4x4.
    if file.stem in backbones.TABLE:
        assert backbones.spec_of(c) == backbones.TABLE[file.stem]


@pytest.mark.parametrize("name", [n if n in BUILT else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_config_builds_as_shapes(name):
    stem, _, variant = name.partition(":")
    c = load(f"{stem}.py:{variant}")
    c.mesh.fsdp = 1
    p = Program(c, partition.make_mesh(c.mesh, jax.devices()[:1]))
    spec = backbones.spec_of(c)
    assert "total" in partition.summary(p.arrays, p.trained)
    # 865.9 M: the U-Net of Stable Diffusion 2.1-base; the others are the encoder of the VAE.
    unet = sum(a.size for n, a in p.arrays.items() if n.startswith("unet/"))
    trained = {n.split("/")[0] for n in p.trained}
    if c.objective in OTHERS:
        kernel = {"kernel_params"} if variant else set()
        assert stem.startswith(c.objective) and trained == OTHERS[c.objective] - kernel
    if c.objective in ("diva", "dcr"):
        assert stem in ("tiny", "world") or unet == 865_910_724
        projection, weight = {"diva": ("visual_proj", "kernel"), "dcr": ("projector", "fc1/kernel")}[c.objective]
        assert trained == {"vision", projection}
        shape = p.arrays[f"{projection}/{weight}"].shape
        assert shape == (spec.embed_dim, c.diffusion.unet.cross_attention_dim)
    if c.objective == "unclip":  # With the class embedding; 2d to 1280 to 1280 channels.
        assert unet == 865_910_724 + (2 * spec.embed_dim + 1) * 1280 + 1281 * 1280
        assert unet / 1e6 == pytest.approx({768: 869.5, 1024: 870.2}[spec.embed_dim], abs=0.05)
        assert trained == {"vision"}


def test_tokens_of_the_eight_conditions():
    """Values in the code of DIVA's authors, by backbone."""
    counts = {n: diva.token_count(s.select, s.patches) for n, s in backbones.TABLE.items()}
    ours = dict(vitl14=77, vitl14_336=77, metaclip_l14=257, metaclip_h14=257, dfn_h14=257, dfn_h14_378=365)
    assert counts == ours | dict(siglip_so400m=43, siglip_so400m_384=73)
    assert counts.keys() <= {f.stem for f in FILES}


def test_what_is_known_of_un2clip():
    for name in ("unclip_vitl14", "unclip_h14"):
        c = load(f"{name}.py")
        assert (c.optim.name, c.optim.lr, c.batch_size, c.diffusion.prompt) == ("adamw", 3e-7, 32, "")
        assert c.data.image_size == 8 * c.diffusion.unet.sample_size == 768
    counted = Program(c, jax.sharding.AbstractMesh((1, 1), ("data", "fsdp"))).flops()
    assert counted.total() / 1e12 == pytest.approx(8.51, rel=0.003)


def test_published_recipe():
    c = load("vitl14.py")
    o = c.optim
    assert (o.name, o.lr, o.momentum, o.weight_decay, o.clip) == ("sgd", 1e-4, 0.9, 0.0, 1.0)
    assert (c.batch_size, c.steps, c.diva.draws, c.data.image_size, c.dtype) == (640, 4600, 2, 512, "bfloat16")
    free = {"draws": 2, "first_timestep": 0, "end_timestep": 0, "condition_of": "own"}
    assert {k: v for k, v in c.diva.items() if v != "exact"} == free
    faithful = load("vitl14.py:faithful")
    assert {k: v for k, v in faithful.diva.items() if v != "faithful"} == free


def test_unknown_variants_are_refused():
    for name in ("vitl14", "kuea_vitl14", "unclip_h14"):
        refused("no variant 'faithfull': write exact or faithful", load, f"{name}.py:faithfull")
    refused("config.objective=unclip has no faithful variant", load, "unclip_h14.py:faithful")
