"""Tests of the FLOP counts against published counts and against the traced program."""

import jax
import pytest
from flax import nnx
from specs import TOWERS
from traced import traced

from diva_jax import config
from diva_jax.costs import flops
from diva_jax.models import backbones
from diva_jax.models.diffusion.unet import UNet, UNetConfig
from diva_jax.models.diffusion.vae import VAE, VAEConfig
from diva_jax.models.layers import Keys, abstract
from diva_jax.objectives import diva

TERA = 1e12


def test_stable_diffusion():
    u = flops.unet(UNetConfig(), 64, 77)
    assert u.forward / TERA == pytest.approx(0.804, rel=0.01)
    assert (u.forward + u.backward) / TERA == pytest.approx(1.671, rel=0.01)
    assert flops.vae(VAEConfig(), 512) / TERA == pytest.approx(1.117, rel=0.01)
    assert flops.vae(VAEConfig(), 768) / TERA == pytest.approx(2.609, rel=0.001)


def test_whole_step():
    def counted(**fields):
        c = config.default("vitl14")
        c.diva.update(fields)
        return abstract(lambda rngs: diva.Objective(c, rngs=rngs))

    assert counted(backbone_passes="faithful").flops() / TERA == pytest.approx(5.43, rel=0.01)
    exact, one_draw = counted(), counted(draws=1)
    assert (exact.flops() - exact.flops_by_part()["vae"]) / TERA == pytest.approx(3.83, rel=0.01)
    assert one_draw.flops_by_part()["unet"] == exact.flops_by_part()["unet"] / 2


@pytest.mark.parametrize("by_class", [False, True])
def test_unet_matches_the_traced_program(by_class):
    """An irregular small U-Net: forward pass, and backward pass to the condition only."""
    c = UNetConfig(
        block_out_channels=(16, 32, 48), layers_per_block=(1, 2, 1), heads=(2, 2, 4), cross_down=(True, False, True),
        cross_up=(True, False, True), cross_attention_dim=24, norm_num_groups=8,
        class_embed_dim=10 if by_class else None,
    )  # fmt: skip
    model = nnx.eval_shape(lambda: UNet(c, rngs=Keys(0)))
    graph, state = nnx.split(model)
    shapes = (((1, 16, 16, 4), "float32"), ((1,), "int32"), ((1, 7, 24), "float32"), ((1, 10), "float32"))
    sample, timesteps, context, labels = (jax.ShapeDtypeStruct(s, d) for s, d in shapes)

    def loss(condition, state, sample, timesteps, context):
        given = (context, condition) if by_class else (condition,)
        return nnx.merge(graph, state)(sample, timesteps, *given).sum()

    args = (labels if by_class else context, state, sample, timesteps, context)
    # The counts include everything except the time and class embeddings.
    projections = 2 * 64 * sum(r for r in (16, 32, 32, 48, 48, 48, 48, 48, 32, 32, 32, 16, 16))
    classes = 2 * (10 * 64 + 64 * 64) * by_class
    time = 2 * (16 * 64 + 64 * 64) + projections + classes
    u = flops.unet(c, 16, 7, by_class)
    forward = traced(jax.make_jaxpr(loss)(*args).jaxpr) - time
    assert u.forward == pytest.approx(forward, rel=2e-3)
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(*args)
    both = traced(jaxpr.jaxpr) - time - (projections + classes) * by_class
    assert u.forward + u.backward == pytest.approx(both, rel=2e-3)


def encoding(make, size: int) -> float:
    """FLOPs of the traced program that encodes one image."""
    graph, state = nnx.split(nnx.eval_shape(make))
    images = jax.ShapeDtypeStruct((1, size, size, 3), "float32")
    return traced(jax.make_jaxpr(lambda state, x: nnx.merge(graph, state).encode(x))(state, images).jaxpr)


@pytest.mark.parametrize("spec", TOWERS.values(), ids=TOWERS)
def test_backbones_match_the_traced_program(spec):
    assert flops.vision(spec) == encoding(lambda: backbones.build(spec, rngs=Keys(0)), spec.image_size)


def test_vae_matches_the_traced_program():
    c = VAEConfig(block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4)
    assert flops.vae(c, 32) == pytest.approx(encoding(lambda: VAE(c, rngs=Keys(0)), 32), rel=1e-2)
