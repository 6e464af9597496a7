"""FLOP counts against published ones and counts by hand; the table of chips and the time of an all-reduce."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import small
from flax import nnx

from diva_jax import config
from diva_jax.common.errors import UserError
from diva_jax.costs import chips
from diva_jax.models.diffusion.flow import Flow, FlowConfig
from diva_jax.models.diffusion.unet import UNet, UNetConfig
from diva_jax.models.diffusion.vae import VAE, VAEConfig
from diva_jax.models.layers import Keys
from diva_jax.training.step import Program

TERA = 1e12


def traced(make, call, *given, wrt: tuple[int, ...] = ()) -> float:
    """TFLOP of `call(model, *given)`, whose arguments have these shapes, and of its gradient to those in `wrt`."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(Keys(0))))
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in given]

    def out(*args):
        return jnp.sum(call(nnx.merge(graph, args[-1]), *args[:-1]))

    return chips.flops_by_part(jax.make_jaxpr(jax.grad(out, wrt) if wrt else out)(*given, state).jaxpr).total() / TERA


def test_stable_diffusion():
    given = ((1, 64, 64, 4), (1, 77, 1024))

    def unet(model, latents, context):
        return model(latents, jnp.zeros(1, jnp.int32), context)

    def make(rngs):
        return UNet(UNetConfig(), rngs=rngs)

    assert traced(make, unet, *given) == pytest.approx(0.804, rel=0.01)
    assert traced(make, unet, *given, wrt=(1,)) == pytest.approx(1.671, rel=0.01)
    for size, tera in ((512, 1.117), (768, 2.609)):
        found = traced(lambda rngs: VAE(VAEConfig(), rngs=rngs), VAE.encode, (1, size, size, 3))
        assert found == pytest.approx(tera, rel=0.01)


@pytest.mark.parametrize("side, forward, condition", [(14, 0.272, 0.546), (21, 0.616, 1.247), (24, 0.810, 1.644)])
def test_genhancers_denoiser(side, forward, condition):
    given = ((1, side**2, 64), (1, 768), (1, 1, 4096))

    def flow(model, x, vector, text):
        return model(x, jnp.zeros(1), jnp.zeros(1), vector, text, (side, side))

    def make(rngs):
        return Flow(FlowConfig(), rngs=rngs)

    assert traced(make, flow, *given) == pytest.approx(forward, rel=2e-3)
    assert traced(make, flow, *given, wrt=(1, 2)) == pytest.approx(condition, rel=2e-3)


def counted():
    c = config.default("vitl14")
    c.batch_size, c.accum = 2, 1
    return Program(c, jax.sharding.AbstractMesh((1, 1), ("data", "fsdp"))).flops()


def test_whole_step():
    exact = counted()
    assert (exact.total() - exact["vae"]) / TERA == pytest.approx(3.83, rel=0.01)
    assert exact.keys() >= {"vae", "vision", "unet"}


@pytest.mark.parametrize("make, again", [
    (small.small_config, dict(remat="all", accum=2)),
    (small.dcr_config, dict(remat="vision", dcr__tile=1)),
    (small.genhancer_config, dict(remat="all")),
], ids=['diva', 'dcr', 'genhancer'])  # fmt: skip
def test_what_is_computed_again_does_not_count(make, again):
    plain, recomputed = (small.program(make(**fields)).flops() for fields in ({}, again))
    assert plain == pytest.approx(recomputed, rel=1e-4) and plain["vision"] > 0


def test_loops_and_strides():
    def loss(w, x):
        def body(x, _):
            with jax.named_scope("turn"):
                return jnp.tanh(x @ w), None

        with jax.named_scope("all"):
            x, _ = jax.lax.scan(body, x, length=5)
        return x.sum()

    w, x = jax.ShapeDtypeStruct((7, 7), jnp.float32), jax.ShapeDtypeStruct((3, 7), jnp.float32)
    assert chips.flops_by_part(jax.make_jaxpr(loss)(w, x).jaxpr) == {"all": 5 * 2 * 3 * 7 * 7}
    both = chips.flops_by_part(jax.make_jaxpr(jax.grad(loss))(w, x).jaxpr)
    assert both == {"all": 15 * 2 * 3 * 7 * 7}

    def strided(x, k):
        return jax.lax.conv_general_dilated(x, k, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")).sum()

    x, k = jax.ShapeDtypeStruct((1, 10, 6, 3), jnp.float32), jax.ShapeDtypeStruct((2, 2, 3, 5), jnp.float32)
    once = 2 * (5 * 3) * (2 * 2) * 3 * 5
    assert chips.flops_by_part(jax.make_jaxpr(strided)(x, k).jaxpr) == {"": once}
    assert chips.flops_by_part(jax.make_jaxpr(jax.grad(strided, (0, 1)))(x, k).jaxpr).total() >= 3 * once


# Matrix units per device, cores x units per core; those of a TPU7x count twice, as its peak and its clock imply.
UNITS = {"v4": 2 * 4, "v5e": 4, "v5p": 2 * 4, "v6e": 4, "tpu7x": 2 * 2}


@pytest.mark.parametrize("name", chips.CHIPS)
def test_the_numbers_of_a_chip_agree(name):
    """Two FLOPs per element and cycle of the matrix units give the published peak; most of the memory is usable."""
    chip = chips.CHIPS[name]
    assert 2 * UNITS[name] * chip.matrix_side**2 * chip.clock == pytest.approx(chip.flops, rel=0.005)
    assert 0.95 * chip.hbm < chip.usable < 1.01 * chip.hbm


def test_the_peak_is_found_by_device_kind():
    peaks = {"TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "NVIDIA H100 80GB HBM3": 989e12}
    for kind, peak in peaks.items():
        assert chips.of(SimpleNamespace(device_kind=kind)).flops == chips.of(kind).flops == peak
    assert chips.of(SimpleNamespace(device_kind="cpu")) is None


def test_topologies():
    assert chips.parse_topology("v5e:4x4") == ("v5e", chips.CHIPS["v5e"], (4, 4))
    assert chips.parse_topology("v4:2x2x4")[2] == (2, 2, 4)
    assert chips.parse_topology("tpu7x:2x2x1") == ("tpu7x", chips.of("TPU7x"), (2, 2, 1))
    for bad in ("v5e", "v5e:4", "tpu7x:4x4", "v5e:4x4x4", "v4:4x4", "v5e:axb", "v5e:0x4", "v9:4x4", "4x4"):
        with pytest.raises(UserError, match=bad):
            chips.parse_topology(bad)


def test_time_of_an_all_reduce():
    chip, gb = chips.CHIPS["v5e"], 1e9
    assert chips.all_reduce_seconds(gb, chip, (1, 1)) == 0
    # A whole pod is a torus: each chip sends 2 x 255/256 GB over all its links.
    assert chips.all_reduce_seconds(gb, chip, (16, 16)) == pytest.approx(2 * gb * 255 / 256 / chip.ici)
    # An axis without wrap-around links has half of the bandwidth, and an axis of one chip has none.
    assert chips.all_reduce_seconds(gb, chip, (4, 4)) == pytest.approx(2 * gb * 15 / 16 / (chip.ici / 2))
    assert chips.all_reduce_seconds(gb, chip, (1, 4)) == pytest.approx(2 * gb * 3 / 4 / (chip.ici / 4))
    # With three axes, only slices of whole cubes of 4 x 4 x 4 chips are tori.
    for name in ("v4", "v5p", "tpu7x"):
        chip = chips.CHIPS[name]
        assert chips.all_reduce_seconds(gb, chip, (4, 4, 8)) == pytest.approx(2 * gb * 127 / 128 / chip.ici)
        assert chips.all_reduce_seconds(gb, chip, (2, 2, 4)) == pytest.approx(2 * gb * 15 / 16 / (chip.ici / 2))
    assert math.isclose(chips.all_reduce_seconds(2 * gb, chip, (4, 4)), 2 * chips.all_reduce_seconds(gb, chip, (4, 4)))
