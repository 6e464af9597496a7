"""GenHancer: sizes and costs at full size from shapes, switches, draws and stages."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from places import ROOT

from diva_jax import config
from diva_jax.common import config_files
from diva_jax.models import adapters, backbones
from diva_jax.models.diffusion import flow
from diva_jax.models.layers import Keys
from diva_jax.objectives import genhancer
from diva_jax.training import partition
from diva_jax.training.step import Program

GIB = 2**30
V5E = 15.75 * GIB  # HBM that is available to a program on one chip.
# Name -> (adapters, biases that stage 2 trains [millions]; TFLOP of an image in stage 2).
CONFIGS = {
    "vitl14": (7.11, 0.22, 1.095),
    "vitl14_336": (7.11, 0.22, 2.538),
    "metaclip_l14": (7.11, 0.22, 1.095),
    "metaclip_h14": (11.83, 0.37, 1.451),
    "siglip_so400m": (8.91, 0.28, 1.214),
    "siglip_so400m_384": (8.91, 0.28, 3.702),
}
SAMPLE = ("vitl14", "siglip_so400m_384")


def per_chip(tree) -> int:
    """Bytes on one device."""
    shapes = jax.tree.leaves(tree)
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * jnp.dtype(a.dtype).itemsize for a in shapes)


@pytest.mark.parametrize("name", [n if n in SAMPLE else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS])
def test_full_size(name):
    """Parameters, adapters, FLOPs, and what a chip holds when weights are split over fsdp=16."""
    c = config_files.read(ROOT / "configs" / f"genhancer_{name}")
    config.validate(c, 16)
    assert backbones.spec_of(c) == backbones.TABLE[name] and c.mesh.fsdp == 16
    mesh = jax.sharding.AbstractMesh((1, 16), ("data", "fsdp"))
    p = Program(c, mesh)
    first, second = p.active(0), p.active(1)
    count = {part: sum(a.size for n, a in p.arrays.items() if n.startswith(part)) for part in ("denoiser/", "vae/")}
    assert count == {"denoiser/": 1_310_154_816, "vae/": 34_274_208}
    assert {n.split("/")[0] for n in first} == {"project_clip", "project_t5", "denoiser"}
    low_rank = sum(p.arrays[n].size for n in second if "/lora/" in n) / 1e6
    biases = sum(p.arrays[n].size for n in second if n.endswith("/bias")) / 1e6
    assert (round(low_rank, 2), round(biases, 2)) == CONFIGS[name][:2]
    assert len(second) == sum("/lora/" in n or n.endswith("/bias") for n in second)
    assert p.flops().total() / 1e12 == pytest.approx(CONFIGS[name][2], rel=1e-3)
    for stage in range(2):
        state = p.abstract_state(stage)
        gradients = {n: state["params"][n] for n in p.active(stage)}
        held = per_chip(state) + per_chip(gradients) + per_chip(p.abstract_frozen())
        assert held < 1.5 * GIB < V5E
    # Without the split, weights, moments and gradients of stage 1 alone would be more than a chip has.
    assert sum(4 * 4 * p.arrays[n].size for n in first) > V5E


def test_published_recipe_and_switches():
    c, faithful = (config_files.read(ROOT / f"configs/genhancer_vitl14.py:{variant}") for variant in ("", "faithful"))
    o, g = c.optim, c.genhancer
    assert (o.name, o.b1, o.b2, o.eps, o.weight_decay, o.clip) == ("adamw", 0.9, 0.999, 1e-8, 0.01, 1.0)
    assert (o.schedule, o.warmup_steps, o.decay_all, c.batch_size) == ("constant", 10, True, 256)
    assert (g.lora.rank, g.lora.alpha, g.lora.dropout, g.lora.biases) == (16, 16.0, 0.1, True)
    stages = Program(c, jax.sharding.AbstractMesh((1, 1), ("data", "fsdp"))).stages
    assert [(s.start, s.end, s.lr, s.warmup_steps) for s in stages] == [
        (0, 100_000, 1e-4, 10),
        (100_000, 110_000, 1e-5, 10),
    ]
    switches = [name for name, value in g.items() if value == "exact"]
    assert len(switches) == 4 and {faithful.genhancer.get(s) for s in switches} == {"faithful"}
    assert [s.warmup_steps for s in genhancer.stages(faithful)] == [0, 0]


def test_tokens_of_a_grid_that_is_not_square():
    """The golden files have square ones: channels of 2 x 2 patches, positions in raster order, rotations by rows."""
    x = np.random.default_rng(0).normal(size=(1, 6, 10, 3))
    for n, (i, j) in enumerate(itertools.product(range(3), range(5))):
        want = x[0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].transpose(2, 0, 1).ravel()
        np.testing.assert_array_equal(flow.pack(jnp.asarray(x))[0, n], np.float32(want))
        assert tuple(flow.token_positions((3, 5))[1 + n]) == (0, i, j)
    cos, _ = flow.rotations(flow.FlowConfig(width=24, heads=2, axes=(4, 2, 6), theta=10), (3, 5))
    np.testing.assert_allclose(cos[-1], np.cos([0, 0, 2, *(4 * 10 ** (-np.arange(3) / 3))]), rtol=1e-6)


def test_initial_values_are_those_of_pytorch():
    """U(+-1/sqrt(fan in)) for weights and biases; zero_out clears modulations and the output alone."""
    sizes = dict(width=36, heads=3, axes=(4, 2, 6), in_channels=12, vector_dim=20, text_dim=28)
    _, arrays = partition.disassemble(flow.Flow(flow.FlowConfig(**sizes), rngs=Keys(1)))
    for name, array in arrays.items():
        if name.endswith("scale"):
            np.testing.assert_array_equal(array, 1.0)
            continue
        bound = arrays[name.rsplit("/", 1)[0] + "/kernel"].shape[0] ** -0.5
        assert 0.8 * bound < float(jnp.abs(array).max()) <= bound, name
        assert abs(float(array.std()) / bound - 3**-0.5) < 0.15, name
    _, zeroed = partition.disassemble(flow.Flow(flow.FlowConfig(**sizes, zero_out=True), rngs=Keys(1)))
    clear = {n for n, a in zeroed.items() if not np.any(np.asarray(a))}
    assert clear == {n for n in arrays if "_mod/" in n or "modulation" in n.lower() or "final_layer/linear" in n}


def tiny(**fields):
    return small.program(small.genhancer_config(**fields))


def test_an_image_has_its_own_draws_and_the_adapters_drop():
    p = tiny(genhancer__lora__dropout=0.5)
    arrays = small.random_arrays(p)
    module = p.skeleton.merge(arrays)
    keys = jax.random.split(jax.random.key(0), 8)
    drawn, drop = module.draw(keys, (14, 14, 3))
    other, _ = module.draw(keys[::-1], (14, 14, 3))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[::-1], b), drawn, other)
    assert drawn.noise.shape == (8, 49, 12) and drawn.posterior.shape == (8, 14, 14, 3)
    pixels = jnp.asarray(np.random.default_rng(0).uniform(size=(8, 28, 28, 3)), jnp.float32)

    def embed(keys):
        with adapters.dropout(keys):
            return module.forward(pixels, drawn.posterior, drawn)[1]["embed"]

    plain = module.forward(pixels, drawn.posterior, drawn)[1]["embed"]
    assert np.abs(embed(drop) - plain).max() > 1e-3 and np.abs(embed(drop) - embed(drop[::-1])).max() > 1e-3
    assert (
        np.abs(
            np.asarray(module.latents(pixels, drawn.posterior) - module.latents(pixels, 0 * pixels[:, :14, :14]))
        ).max()
        > 1e-3
    )


def test_switches_of_siglip():
    """faithful: tanh's GELU in the tower; the head's output projection has a trained bias and no adapter."""
    rows = {}
    for value in ("exact", "faithful"):
        p = tiny(spec=small.SIGLIP_28, genhancer__siglip_head_out=value, genhancer__siglip_gelu=value)
        rows[value] = {n for n in p.active(1) if n.startswith("vision/attn_pool/proj/")}
        assert p.objective.vision.blocks[0].mlp.activation == {"exact": "gelu", "faithful": "gelu_tanh"}[value]
        pooled = {n for n in p.active(1) if n.startswith("vision/attn_pool/")} - rows[value]
        assert all("/mlp/fc" in n for n in pooled) and len(pooled) == 6
    base = "vision/attn_pool/proj"
    assert rows == {"exact": {f"{base}/bias", f"{base}/lora/a", f"{base}/lora/b"}, "faithful": {f"{base}/bias"}}


def test_what_each_stage_trains():
    generator = {"project_clip", "project_t5", "denoiser"}
    for stage2, parts in (("only", {"vision"}), ("all", generator | {"vision"})):
        p = tiny(genhancer__stage2=stage2)
        assert {n.split("/")[0] for n in p.active(0)} == generator
        assert {n.split("/")[0] for n in p.active(1)} == parts
        assert not any("norm" in n or "embed" in n for n in p.active(1) if n.startswith("vision/"))
    p = tiny(genhancer__stage2="none")
    assert [s.name for s in p.stages] == ["stage1"] and not any("lora" in n for n in p.arrays)
    p = tiny(genhancer__stage1_steps=0, frozen_dtype="bfloat16")
    assert [s.name for s in p.stages] == ["stage2"]
    assert {str(a.dtype) for n, a in p.arrays.items() if n.startswith("denoiser/")} == {"bfloat16"}
    assert {str(a.dtype) for n, a in p.arrays.items() if n.startswith("vae/")} == {"float32"}
