"""The files of configs/ have the published values, are valid, and build the models that they name."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from helpers import refused
from places import ROOT

from diva_jax import config, objectives
from diva_jax.common import config_files, fields
from diva_jax.data import inputs
from diva_jax.models import backbones
from diva_jax.objectives import diva
from diva_jax.training import partition
from diva_jax.training.step import Program, pace

FILES = sorted((ROOT / "configs").glob("*.py"))
NAMES = [f.stem for f in FILES if not f.stem.startswith("genhancer")] + ["kuea_vitl14:faithful"]
# One of each objective but DCR, see below, and of each architecture of a backbone; `make slow` builds all.
BUILT = "custom tiny world vitl14 siglip_so400m_384 unclip_h14 judge_vitl14 kuea_vitb16".split()
BUILT += ["kuea_vitl14:faithful", "smartclip_vitl14", "comclip_vitl14", "salm_vitl14"]
TRAINED = {"diva": {"vision", "visual_proj"}, "dcr": {"vision", "projector"}, "salm": {"vision", "adapter"}}
TRAINED |= {"kuea": {"vision", "kernel_params"}, "smartclip": {"vision", "text", "mask_net"}}
TRAINED |= dict.fromkeys(("unclip", "judge", "comclip"), {"vision"})
TFLOP = json.loads(Path(__file__).with_name("tflop.json").read_text())  # Per image, in docs/OBJECTIVES.md.


def load(name: str):
    return config_files.read(ROOT / "configs" / name)


def sampled(names, sample) -> list:
    return [n if n in sample else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_is_valid(file):
    assert "python -m diva_jax.main --config=configs/" in file.read_text().split('"""')[1]
    c = load(file.name)
    config.validate(c, 1 if file.stem in ("tiny", "world") else 16)  # The others are for a v5e:4x4.
    if file.stem in backbones.TABLE:
        assert backbones.spec_of(c) == backbones.TABLE[file.stem]


@pytest.mark.parametrize("name", sampled(NAMES, BUILT))
def test_config_builds_as_shapes(name):
    stem, _, variant = name.partition(":")
    c = load(f"{stem}.py:{variant}")
    c.mesh.fsdp = 1
    p = Program(c, partition.make_mesh(c.mesh, jax.devices()[:1]))
    spec = backbones.spec_of(c)
    assert "total" in partition.summary(p.arrays, p.trained)
    assert {n.split("/")[0] for n in p.trained} == TRAINED[objectives.section(c.objective)] - (
        {"kernel_params"} if variant else set()
    )
    if stem not in ("tiny", "world") and c.objective in ("diva", "dcr", "judge", "unclip"):
        # The U-Net of Stable Diffusion 2.1-base; un2CLIP's with the class embedding, 2d to 1280 to 1280 channels.
        labels = (2 * spec.embed_dim + 1) * 1280 + 1281 * 1280 if c.objective == "unclip" else 0
        assert sum(a.size for n, a in p.arrays.items() if n.startswith("unet/")) == 865_910_724 + labels
    if c.objective == "smartclip":
        rate = p.active(0)
        assert (rate["mask_net/proj/kernel"], rate["text/pos_embed"]) == (1000, 1)
        assert p.arrays["text/pos_embed"].shape == (248, {"smartclip_vitl14": 768, "smartclip_vitb16": 512}[stem])
        assert p.objective.inputs["caption"].choose is inputs.first_sentences
    if c.objective in ("diva", "dcr"):
        shape = p.arrays[{"diva": "visual_proj/kernel", "dcr": "projector/fc1/kernel"}[c.objective]].shape
        assert shape == (spec.embed_dim, c.diffusion.unet.cross_attention_dim)
    if stem in TFLOP:
        assert p.flops().total() / 1e12 == pytest.approx(TFLOP[stem], rel=0.001)


# Name -> [adapters, biases that stage 2 trains [millions]; TFLOP of an image in stage 2].
GENHANCER = json.loads(Path(__file__).with_name("genhancer.json").read_text())
GIB = 2**30
V5E = 15.75 * GIB  # HBM that is available to a program on one chip.


def per_chip(tree) -> int:
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", sampled(GENHANCER, ("vitl14", "siglip_so400m_384")))
def test_genhancer_at_full_size(name):
    """Parameters, adapters, FLOPs, and what a chip holds when weights are split over fsdp=16."""
    c = load(f"genhancer_{name}")
    assert backbones.spec_of(c) == backbones.TABLE[name] and c.mesh.fsdp == 16
    p = Program(c, jax.sharding.AbstractMesh((1, 16), ("data", "fsdp")))
    first, second = p.active(0), p.active(1)
    count = {part: sum(a.size for n, a in p.arrays.items() if n.startswith(part)) for part in ("denoiser/", "vae/")}
    assert count == {"denoiser/": 1_310_154_816, "vae/": 34_274_208}
    assert {n.split("/")[0] for n in first} == {"project_clip", "project_t5", "denoiser"}
    millions = [sum(p.arrays[n].size for n in second if part in n) / 1e6 for part in ("/lora/", "/bias")]
    assert [round(n, 2) for n in millions] == GENHANCER[name][:2]
    assert len(second) == sum("/lora/" in n or n.endswith("/bias") for n in second)
    assert p.flops().total() / 1e12 == pytest.approx(GENHANCER[name][2], rel=1e-3)
    for stage in range(2):
        state = p.abstract_state(stage)
        gradients = {n: state["params"][n] for n in p.active(stage)}
        assert per_chip(state) + per_chip(gradients) + per_chip(p.abstract_frozen()) < 1.5 * GIB < V5E
    # Without the split, weights, moments and gradients of stage 1 alone would be more than a chip has.
    assert sum(4 * 4 * p.arrays[n].size for n in first) > V5E


def test_adapters_and_passes_of_dcr():
    p = Program(load("dcr_vitl14"), jax.sharding.AbstractMesh((1, 1), ("data", "fsdp")))
    sizes = [sum(p.arrays[n].size for n in p.active(1) if ("/lora/" in n) == low_rank) for low_rank in (True, False)]
    assert sizes == [7_106_560, 221_184]
    # 17 passes, each at 28 x 28 latents; the attention over pixels shrinks more than the rest.
    assert 0.8 < p.flops()["unet"] / (17 * (28 / 64) ** 2 * 1.671e12) < 1


# Config -> the fields that its paper or its authors' code gives; steps and learning rate of the stages, steps of the
# last one's warm-up, tokens of DIVA's condition.
RECIPES = json.loads(Path(__file__).with_name("recipes.json").read_text())


@pytest.mark.parametrize("name", RECIPES)
def test_published_recipe(name):
    c, published = load(name), load(name)
    published.update(RECIPES[name]["fields"])
    assert json.loads(c.to_json()) == json.loads(published.to_json())
    stages, spec = objectives.stages(c), backbones.spec_of(c)
    found = dict(stages=[[s.steps, s.lr] for s in stages], tokens=diva.token_count(spec.select, spec.patches))
    found["warmup"] = int(pace(stages[-1], c.optim.warmup).warm)
    assert found == found | {n: value for n, value in RECIPES[name].items() if n != "fields"}


@pytest.mark.parametrize("name, count", [("vitl14", 5), ("genhancer_vitl14", 4), ("dcr_vitl14", 6), ("kuea_vitl14", 4)])
def test_the_faithful_variant_differs_in_its_switches_alone(name, count):
    exact, faithful = (fields.flatten(load(f"{name}.py{variant}")) for variant in ("", ":faithful"))
    differ = [(v, faithful[k]) for k, v in exact.items() if v != faithful[k]]
    assert differ == [("exact", "faithful")] * count and exact.keys() == faithful.keys()
    if name == "genhancer_vitl14":
        warm = [[s.warmup_steps for s in objectives.stages(load(f"{name}.py{v}"))] for v in ("", ":faithful")]
        assert warm == [[10, 10], [0, 0]]


def test_unknown_variants_are_refused():
    for name in ("vitl14", "kuea_vitl14", "unclip_h14"):
        refused("no variant 'faithfull': write exact or faithful", load, f"{name}.py:faithfull")
    refused("config.objective=unclip has no faithful variant", load, "unclip_h14.py:faithful")
