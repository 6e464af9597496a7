"""The TPU's feed-forward kernel against the modules that it replaces, and the choice between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import abstract_mesh, close, relative_error

from diva_jax.models import feed_forward, platform
from diva_jax.models.diffusion.blocks import FeedForward
from diva_jax.models.layers import Layers


def layer(channels, dtype, seed=0):
    """A norm and a feed-forward layer with random weights, none of them zero or one."""
    layers = Layers(nnx.Rngs(seed), dtype, dtype)
    pair = layers.layer_norm(channels, 1e-5), FeedForward(channels, layers)
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(pair)
    state = jax.tree.map(lambda a: a + jnp.asarray(0.2 * rng.normal(size=a.shape), a.dtype), state)
    return graph, state


def value_and_grads(fn, x, state, weight):
    out, pull = jax.vjp(fn, x, state)
    return out, *pull(weight.astype(out.dtype))


@pytest.mark.parametrize(("batch", "tokens", "channels"), [(2, 384, 32), (1, 128, 192)])
def test_the_kernel_equals_the_modules(batch, tokens, channels):
    """Result and gradients with respect to tokens and weights, in float32; hidden units in one part and in several."""
    graph, state = layer(channels, jnp.float32)
    rng = np.random.default_rng(1)
    x, weight = (jnp.asarray(rng.normal(size=(batch, tokens, channels)), jnp.float32) for _ in range(2))

    def plain(x, state):
        norm, ff = nnx.merge(graph, state)
        return x + ff(norm(x))

    def fused(x, state):
        return feed_forward.fused(x, state, graph, True)

    with jax.default_matmul_precision("highest"):
        goals = value_and_grads(plain, x, state, weight)
        ours = value_and_grads(fused, x, state, weight)
        # Without a backward pass, the kernel saves nothing.
        np.testing.assert_array_equal(fused(x, state), ours[0])
    assert jax.tree.structure(goals) == jax.tree.structure(ours)
    for found, goal in zip(jax.tree.leaves(ours), jax.tree.leaves(goals), strict=True):
        close(found, goal, 2e-5)


def test_in_bfloat16_it_is_no_worse_than_the_modules():
    """Errors against float32 of result and gradient of the tokens, whose mean is ten times their deviation."""
    graph, state = layer(64, jnp.bfloat16)
    rng = np.random.default_rng(2)
    x = jnp.asarray(10 + rng.normal(size=(2, 256, 64)), jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=x.shape), jnp.bfloat16)
    exact_graph, _ = layer(64, jnp.float32)

    def plain(x, state):
        norm, ff = nnx.merge(exact_graph if x.dtype == jnp.float32 else graph, state)
        return x + ff(norm(x))

    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (x, state, weight))
    goals = value_and_grads(plain, *wide)[:2]
    modules = value_and_grads(plain, x, state, weight)[:2]
    kernel = value_and_grads(lambda x, state: feed_forward.fused(x, state, graph, True), x, state, weight)[:2]
    for ours, theirs, goal in zip(kernel, modules, goals, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert relative_error(ours, goal) <= 1.02 * relative_error(theirs, goal) < 0.02


@pytest.mark.parametrize(
    ("shape", "dtype", "device", "expected"),
    [
        ((8, 4096, 320), jnp.bfloat16, "TPU v5 lite", True),
        ((8, 1024, 640), jnp.bfloat16, "TPU v6 lite", True),
        ((8, 1024, 640), jnp.bfloat16, "TPU v4", False),  # It has too little VMEM.
        ((8, 256, 640), jnp.bfloat16, "TPU v5", False),  # Few tokens.
        ((8, 1024, 1280), jnp.bfloat16, "TPU v5", False),  # Weights that do not fit.
        ((8, 1000, 320), jnp.bfloat16, "TPU v5", False),  # Tokens that do not fill tiles.
        ((6, 1024, 320), jnp.bfloat16, "TPU v5", False),  # A batch that four devices cannot share.
        ((8, 1024, 320), jnp.float32, "TPU v5", False),
        ((8, 1024, 320), jnp.bfloat16, "cpu", False),
    ],
)
def test_the_choice(shape, dtype, device, expected):
    with jax.sharding.use_abstract_mesh(abstract_mesh(device[:3].lower(), kind=device)):
        assert feed_forward.use_kernel(shape, 4 * shape[2], dtype) is expected


def test_the_block_calls_the_kernel_on_tpus():
    """The traced program of the layer has both kernels on a TPU's mesh, by the names that costs/hlo.py knows."""
    graph, state = nnx.split(nnx.eval_shape(lambda: nnx.merge(*layer(128, jnp.bfloat16))))
    x = jax.ShapeDtypeStruct((4, 512, 128), jnp.bfloat16)

    def loss(x, state):
        return jnp.sum(feed_forward.feed_forward(x, *nnx.merge(graph, state)).astype(jnp.float32))

    def traced(allowed):
        with platform.traced_on(abstract_mesh("tpu", kind="TPU v5 lite"), allowed):
            return str(jax.make_jaxpr(jax.grad(loss))(x, state))

    assert "pallas_call" not in traced({"feed-forward 320"})
    text = traced({"feed-forward 128"})
    assert "feed_forward_forward_h512" in text and "feed_forward_backward_h512" in text
