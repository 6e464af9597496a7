"""Tests of the FLOP counts against published counts, and counts by hand."""

import jax
import jax.numpy as jnp
import pytest
import small
from flax import nnx

from diva_jax import config
from diva_jax.costs import flops
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

    return flops.by_part(jax.make_jaxpr(jax.grad(out, wrt) if wrt else out)(*given, state).jaxpr).total() / TERA


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


def counted(**fields):
    c = config.default("vitl14")
    c.batch_size, c.accum = 2, 1
    c.diva.update(fields)
    return Program(c, jax.sharding.AbstractMesh((1, 1), ("data", "fsdp"))).flops()


def test_whole_step():
    assert counted(backbone_passes="faithful").total() / TERA == pytest.approx(5.43, rel=0.01)
    exact = counted()
    assert (exact.total() - exact["vae"]) / TERA == pytest.approx(3.83, rel=0.01)
    assert exact.keys() >= {"vae", "vision", "unet"}


@pytest.mark.parametrize(
    "make, again",
    [
        (small.small_config, dict(remat="all", accum=2)),
        (small.dcr_config, dict(remat="vision", dcr__tile=1)),
        (small.genhancer_config, dict(remat="all")),
    ],
    ids=["diva", "dcr", "genhancer"],
)
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
    assert flops.by_part(jax.make_jaxpr(loss)(w, x).jaxpr) == {"all": 5 * 2 * 3 * 7 * 7}
    both = flops.by_part(jax.make_jaxpr(jax.grad(loss))(w, x).jaxpr)
    assert both == {"all": 15 * 2 * 3 * 7 * 7}

    def strided(x, k):
        return jax.lax.conv_general_dilated(x, k, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")).sum()

    x, k = jax.ShapeDtypeStruct((1, 10, 6, 3), jnp.float32), jax.ShapeDtypeStruct((2, 2, 3, 5), jnp.float32)
    once = 2 * (5 * 3) * (2 * 2) * 3 * 5
    assert flops.by_part(jax.make_jaxpr(strided)(x, k).jaxpr) == {"": once}
    assert flops.by_part(jax.make_jaxpr(jax.grad(strided, (0, 1)))(x, k).jaxpr).total() >= 3 * once
