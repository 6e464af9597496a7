"""The TPU's attention and feed-forward kernels against the modules that they replace, and the choice between them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import abstract_mesh as mesh, close
from jax.sharding import PartitionSpec as P

from diva_jax.models import adapters, attention, kernels as pallas, platform
from diva_jax.models.backbones.shared import transformer
from diva_jax.models.diffusion import blocks
from diva_jax.models.layers import Layers, abstract


def qkv(n, m, heads, width):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(2, s, heads, width)), jnp.float32) for s in (n, m, m)]


def value_and_grads(fn, *args):
    """The result, and the gradients of its sum with random weights to each argument."""
    out, pull = jax.vjp(fn, *args)
    return out, *pull(np.random.default_rng(1).normal(size=out.shape).astype(out.dtype))


def assert_equal(kernel, plain, *args):
    """Forward and backward, and alone without a backward pass, for which a kernel saves nothing."""
    ours, goals = (jax.jit(functools.partial(value_and_grads, fn))(*args) for fn in (kernel, plain))
    for found, goal in zip(*map(jax.tree.leaves, ((jax.jit(kernel)(*args), ours), (goals[0], goals))), strict=True):
        close(found, goal, 2e-5)


@pytest.mark.parametrize(("kernel", "n", "m", "heads", "width"), [
    ("flash", 256, 256, 2, 64), ("flash", 130, 77, 2, 72), ("flash", 200, 365, 1, 160), ("splash", 130, 300, 2, 64),
])  # fmt: skip
def test_the_kernel_equals_plain_attention(kernel, n, m, heads, width):
    """Forward and all three gradients, heads of every width in use, lengths that need padding; jax's kernel too."""
    kernel = functools.partial(getattr(attention, kernel), interpret=True)
    assert_equal(kernel, jax.nn.dot_product_attention, *qkv(n, m, heads, width))


@pytest.mark.parametrize("largest, share", [(1, (0, 0)), (3, (0.01, 0.99)), (20, (1, 1))])
def test_scores_beyond_the_bound_of_the_norms(largest, share, monkeypatch):
    """Every tile within the bound, some or all beyond it; of whole numbers, so that scores of hundreds are exact."""
    monkeypatch.setattr(attention, "MAX_BLOCK", {512: 128})
    rng = np.random.default_rng(largest)
    q, k = (jnp.asarray(rng.integers(-largest, largest + 1, (1, n, 2, 16)), jnp.float32) for n in (300, 290))
    k = k.at[:, 128:256].multiply(4)
    v = jnp.asarray(rng.normal(size=k.shape), jnp.float32)
    norms = [jnp.linalg.norm(x, axis=-1)[0] for x in (q, k)]
    tiles = [[n[i : i + 128].max(axis=0) for i in (0, 128, 256)] for n in norms]
    assert share[0] <= np.mean([a * b / 4 > pallas.BOUNDED_SCORE for a in tiles[0] for b in tiles[1]]) <= share[1]
    out = jax.jit(lambda a: attention.flash(*a, interpret=True))((q, k, v))
    close(out, jax.nn.dot_product_attention(q, k, v), 2e-5)


@pytest.mark.parametrize(("n", "m", "heads", "width"), [(37, 37, 3, 8), (30, 7, 1, 40), (1, 19, 5, 6)])
def test_attention_on_cpus_equals_plain_attention(n, m, heads, width):
    """Scores are large, so that a softmax without its largest score subtracted overflows; a float32 score of up to 200
    is rounded by 2^-24 of itself, which changes its weight by 1.2e-5 of itself. The reference is in float64."""
    args = [40 * qkv(n, m, heads, width)[0], *qkv(n, m, heads, width)[1:]]
    run = functools.partial(value_and_grads, attention.attention)
    with jax.sharding.use_abstract_mesh(mesh("cpu")):
        ours = jax.jit(run)(*args)
    with jax.enable_x64(True):
        expected = jax.jit(run)(*(np.asarray(a, np.float64) for a in args))
    for x, goal in zip(ours, expected, strict=True):
        close(x, goal, 2e-5)


def test_what_attention_keeps_on_cpus_and_what_is_not_a_number():
    args = qkv(51, 43, 3, 8)
    with jax.sharding.use_abstract_mesh(mesh("cpu")):
        back = jax.eval_shape(lambda *a: jax.vjp(attention.attention, *a)[1], *args)
    assert max(x.size for x in jax.tree.leaves(back)) == args[0].size < 2 * 3 * 51 * 43
    q, k, v = qkv(130, 140, 1, 16)
    out = attention.flash(q.at[0, 3].set(jnp.nan), k, v, interpret=True)
    assert jnp.isnan(out[0, 3]).all() and jnp.isfinite(out[1]).all()


def test_each_implementation_is_for_its_device(monkeypatch):
    """cuDNN on GPUs in 16 bits, with heads that it supports; the kernel on TPUs for long sequences; else neither."""
    tpu, cpu, gpu = (mesh(p) for p in ("tpu", "cpu", "gpu"))
    assert [attention.implementation(64, "bfloat16", m) for m in (gpu, tpu, cpu)] == ["cudnn", None, None]
    assert [attention.implementation(w, "float16", gpu) for w in (128, 40, 512, 36)] == ["cudnn", "cudnn", None, None]
    assert attention.implementation(64, "float32", gpu) is None
    asked = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **kw: asked.append(kw["implementation"]) or q)
    args = [x.astype(jnp.bfloat16) for x in qkv(6, 7, 2, 64)]
    with jax.sharding.use_abstract_mesh(gpu):
        jax.eval_shape(attention.attention, *args)
    jax.eval_shape(attention.attention, *args)  # Where no mesh says so.
    assert asked == ["cudnn", None]
    long = attention.KERNEL_FROM["self"]
    assert attention.kernel_of(long, long, 64, 8, tpu) and not attention.kernel_of(long - 1, long - 1, 64, 8, tpu)
    for device in (cpu, gpu, jax.sharding.get_abstract_mesh()):
        assert not attention.kernel_of(4096, 4096, 64, 8, device)
    assert not attention.kernel_of(4096, 4096, 1024, 8, tpu), "a head that no tile is known for"
    assert not attention.kernel_of(4096, 4096, 64, 6, tpu), "a batch that the devices cannot share"
    assert bool(attention.kernel_of(4096, 77, 64, 8, tpu)) == (attention.KERNEL_FROM["cross"] <= 4096)


@pytest.mark.parametrize("images, tokens, allowed, count", [
    (64, 257, None, 8), (8, 257, None, 1), (64, 577, None, 1), (64, 577, set(), 32), (7, 577, set(), 7),
])  # fmt: skip
def test_towers_with_remat_take_a_batch_in_parts_whose_scores_fit(images, tokens, allowed, count):
    stack = abstract(lambda rngs: transformer.blocks(Layers(rngs, jnp.bfloat16), 1, 1024, 16, 64, "gelu", 1e-5))
    x = jax.ShapeDtypeStruct((4 * images, tokens, 1024), jnp.bfloat16)
    for kind, keys, parts in (("TPU v5 lite", None, count), ("TPU v5 lite", x, 1), ("TPU7x", None, 1), ("", None, 1)):
        with platform.traced_on(mesh("tpu", kind=kind), allowed), adapters.dropout(keys):
            text = str(jax.make_jaxpr(lambda x: transformer.run(stack, x, remat=True))(x))
        assert [int(n) for n in re.findall(r"length=(\d+)", text)] == [parts] * (parts > 1)


def program(device, allowed=None, length=1024, **kw):
    args = [jax.ShapeDtypeStruct((8, length, 2, 64), jnp.bfloat16)] * 3
    with platform.traced_on(mesh(device), allowed):
        return jax.make_jaxpr(lambda *a: attention.attention(*a, **kw))(*args)


def test_the_mesh_and_what_is_allowed_decide_and_not_this_machine():
    """Without the kernel XLA computes it, or jax's for long sequences."""

    def kernels(*args):
        return [name[:6] for name in re.findall(r"name=((?:flash|splash)_\w+)", str(program("tpu", *args)))]

    for allowed in (frozenset(), {"attention 72", "feed-forward 320"}):
        assert [kernels(allowed, attention.SPLASH_FROM - n) for n in (0, 1)] == [["splash"], []]
    assert kernels({"attention 64"}, attention.SPLASH_FROM) == ["flash_"]
    for device, causal, count in (("tpu", False, 1), ("cpu", False, 0), ("tpu", True, 0)):
        assert str(program(device, causal=causal)).count("pallas_call[") == count
    # Each device runs its own images, in a shard_map over both axes; q, k, v come after the replicated mask's tables.
    (shards,) = (e for e in program("tpu").jaxpr.eqns if e.primitive.name == "shard_map")
    assert shards.params["in_specs"][-3:] == (P(("data", "fsdp")),) * 3
    assert [v.aval.shape[0] for v in shards.params["jaxpr"].invars[-3:]] == [2] * 3


def layer(channels, dtype, seed=0):
    layers = Layers(nnx.Rngs(seed), dtype, dtype)
    pair = layers.layer_norm(channels, 1e-5), blocks.FeedForward(channels, layers)
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(pair)
    return graph, jax.tree.map(lambda a: a + jnp.asarray(0.2 * rng.normal(size=a.shape), a.dtype), state)


@pytest.mark.parametrize(("batch", "tokens", "channels"), [(2, 384, 32), (1, 128, 192)])
def test_the_kernel_equals_the_modules(batch, tokens, channels):
    """Result and gradients with respect to tokens and weights, in float32; hidden units in one part and in several."""
    graph, state = layer(channels, jnp.float32)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(batch, tokens, channels)), jnp.float32)

    def plain(x, state):
        norm, ff = nnx.merge(graph, state)
        return x + ff(norm(x))

    assert_equal(lambda x, state: blocks.fused(x, state, graph, True), plain, x, state)


BF16 = jnp.bfloat16


@pytest.mark.parametrize(("shape", "dtype", "device", "expected"), [
    ((8, 4096, 320), BF16, "TPU v5 lite", True), ((8, 1024, 640), BF16, "TPU v6 lite", True),
    ((8, 1024, 640), BF16, "TPU v4", False),  # It has too little VMEM.
    ((8, 256, 640), BF16, "TPU v5", False),  # Few tokens.
    ((8, 1024, 1280), BF16, "TPU v5", False),  # Weights that do not fit.
    ((8, 1000, 320), BF16, "TPU v5", False),  # Tokens that do not fill tiles.
    ((6, 1024, 320), BF16, "TPU v5", False),  # A batch that four devices cannot share.
    ((8, 1024, 320), jnp.float32, "TPU v5", False), ((8, 1024, 320), BF16, "cpu", False),
])  # fmt: skip
def test_the_choice(shape, dtype, device, expected):
    with jax.sharding.use_abstract_mesh(mesh(device[:3].lower(), kind=device)):
        assert blocks.use_kernel(shape, 4 * shape[2], dtype) is expected


def test_the_block_calls_the_kernel_on_tpus():
    """The traced program of the layer has both kernels on a TPU's mesh, by the names that costs/hlo.py knows."""
    graph, state = nnx.split(nnx.eval_shape(lambda: nnx.merge(*layer(128, jnp.bfloat16))))
    x = jax.ShapeDtypeStruct((4, 512, 128), jnp.bfloat16)

    def traced(allowed):
        run = functools.partial(value_and_grads, lambda x, state: blocks.feed_forward(x, *nnx.merge(graph, state)))
        with platform.traced_on(mesh("tpu", kind="TPU v5 lite"), allowed):
            return str(jax.make_jaxpr(run)(x, state))

    assert "pallas_call" not in traced({"feed-forward 320"})
    text = traced({"feed-forward 128"})
    assert "feed_forward_forward_h512" in text and "feed_forward_backward_h512" in text
