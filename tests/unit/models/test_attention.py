"""The TPU's attention kernel against plain attention, and the choice between them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import abstract_mesh as mesh
from helpers import close, within
from jax.sharding import PartitionSpec as P

from diva_jax.models import attention, platform
from diva_jax.models.kernels import flash


def qkv(n, m, heads, width, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(batch, s, heads, width)), jnp.float32) for s in (n, m, m)]


@pytest.mark.parametrize(
    ("kernel", "n", "m", "heads", "width"),
    [("flash", 256, 256, 2, 64), ("flash", 130, 77, 2, 72), ("flash", 200, 365, 1, 160), ("splash", 130, 300, 2, 64)],
)
def test_the_kernel_equals_plain_attention(kernel, n, m, heads, width):
    """Forward and all three gradients, heads of every width in use, lengths that need padding; jax's kernel too."""
    kernel = functools.partial(getattr(attention, kernel), interpret=True)
    args = qkv(n, m, heads, width)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=args[0].shape), jnp.float32)

    def value_and_grads(fn):
        return jax.jit(jax.value_and_grad(lambda a: jnp.sum(weight * fn(*a)), has_aux=False))(args)

    with jax.default_matmul_precision("highest"):
        out = jax.jit(lambda a: kernel(*a))(args)
        close(out, jax.nn.dot_product_attention(*args), 2e-5)
        value, grads = value_and_grads(kernel)
        expected, goals = value_and_grads(jax.nn.dot_product_attention)
    within(abs(value - expected), 1e-4 * abs(expected), "value")
    for ours, goal in zip(grads, goals, strict=True):
        close(ours, goal, 2e-5)


@pytest.mark.parametrize("largest, share", [(1, (0, 0)), (3, (0.01, 0.99)), (20, (1, 1))])
def test_scores_beyond_the_bound_of_the_norms(largest, share, monkeypatch):
    """Every tile within the bound, some tiles beyond it, and all of them; three tiles each way, the last one padded.

    Queries and keys are whole numbers, so that scores of hundreds are exact and only the softmax is compared.
    """
    monkeypatch.setattr(attention, "MAX_BLOCK", {512: 128})
    rng = np.random.default_rng(largest)
    q, k = (jnp.asarray(rng.integers(-largest, largest + 1, (1, n, 2, 16)), jnp.float32) for n in (300, 290))
    k = k.at[:, 128:256].multiply(4)
    v = jnp.asarray(rng.normal(size=k.shape), jnp.float32)
    norms = [jnp.linalg.norm(x, axis=-1)[0] for x in (q, k)]
    tiles = [[n[i : i + 128].max(axis=0) for i in (0, 128, 256)] for n in norms]
    beyond = np.mean([a * b / 4 > flash.BOUNDED_SCORE for a in tiles[0] for b in tiles[1]])
    assert share[0] <= beyond <= share[1]
    with jax.default_matmul_precision("highest"):
        out = jax.jit(lambda a: attention.flash(*a, interpret=True))((q, k, v))
        close(out, jax.nn.dot_product_attention(q, k, v), 2e-5)


def test_what_is_not_a_number_stays_so():
    q, k, v = qkv(130, 140, 1, 16)
    out = attention.flash(q.at[0, 3].set(jnp.nan), k, v, interpret=True)
    assert jnp.isnan(out[0, 3]).all() and jnp.isfinite(out[1]).all()


@pytest.mark.parametrize(("n", "m", "heads", "width"), [(37, 37, 3, 8), (30, 7, 1, 40), (1, 19, 5, 6)])
def test_attention_on_cpus_equals_plain_attention(n, m, heads, width):
    """Forward and gradients; scores are large, so that a softmax without its largest score subtracted overflows.

    The reference is in float64. A float32 score of up to 200 is rounded by 2^-24 of itself, which changes its weight
    by 1.2e-5 of itself.
    """
    args = [40 * qkv(n, m, heads, width)[0], *qkv(n, m, heads, width)[1:]]
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(2, n, heads * width)), jnp.float32)

    def value_and_grads(args, weight):
        out, back = jax.vjp(attention.attention, *args)
        return [out, *back(weight)]

    with jax.default_matmul_precision("highest"), jax.sharding.use_abstract_mesh(mesh("cpu")):
        ours = value_and_grads(args, weight)
    with jax.enable_x64(True):
        expected = value_and_grads([np.asarray(a, np.float64) for a in args], np.asarray(weight, np.float64))
    for x, goal in zip(ours, expected, strict=True):
        close(x, goal, 2e-5)


def test_attention_on_cpus_keeps_no_weights():
    """What is kept for the backward pass has no array of queries times keys; the largest are the arguments."""
    args = qkv(51, 43, 3, 8)
    with jax.sharding.use_abstract_mesh(mesh("cpu")):
        back = jax.eval_shape(lambda *a: jax.vjp(attention.attention, *a)[1], *args)
    assert max(x.size for x in jax.tree.leaves(back)) == args[0].size < 2 * 3 * 51 * 43


def test_cudnn_is_for_gpus(monkeypatch):
    """In 16 bits, with heads that it supports, and without a mask or with one; never where no mesh says so."""
    gpu, asked = mesh("gpu"), []
    meshes = (gpu, mesh("tpu"), mesh("cpu"))
    assert [attention.implementation(64, "bfloat16", m) for m in meshes] == ["cudnn", None, None]
    assert [attention.implementation(64, "float32", m) for m in meshes] == [None, None, None]
    assert [attention.implementation(w, "float16", gpu) for w in (128, 40, 512, 36)] == ["cudnn", "cudnn", None, None]

    def plain(q, k, v, *, implementation, **kw):
        asked.append(implementation)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
    args = [x.astype(jnp.bfloat16) for x in qkv(6, 7, 2, 64)]
    with jax.sharding.use_abstract_mesh(gpu):
        jax.eval_shape(attention.attention, *args)
    jax.eval_shape(attention.attention, *args)
    assert asked == ["cudnn", None]


def test_the_kernel_is_for_long_sequences_on_tpus():
    tpu, cpu, gpu = (mesh(p) for p in ("tpu", "cpu", "gpu"))
    long = attention.KERNEL_FROM["self"]
    assert attention.use_kernel(long, long, 64, 8, tpu)
    assert not attention.use_kernel(long - 1, long - 1, 64, 8, tpu)
    assert not attention.use_kernel(4096, 4096, 64, 8, cpu)
    assert not attention.use_kernel(4096, 4096, 64, 8, gpu)
    assert not attention.use_kernel(4096, 4096, 64, 8, jax.sharding.get_abstract_mesh())
    assert not attention.use_kernel(4096, 4096, 1024, 8, tpu), "a head that no tile is known for"
    assert not attention.use_kernel(4096, 4096, 64, 6, tpu), "a batch that the devices cannot share"
    assert attention.use_kernel(4096, 77, 64, 8, tpu) == (attention.KERNEL_FROM["cross"] <= 4096)


def program(device, allowed=None, length=1024, **kw):
    """The program of attention, traced for a platform without the hardware."""
    args = [jax.ShapeDtypeStruct((8, length, 2, 64), jnp.bfloat16)] * 3
    with platform.traced_on(mesh(device), allowed):
        return jax.make_jaxpr(lambda *a: attention.attention(*a, **kw))(*args)


def test_kernels_that_are_not_allowed():
    """XLA computes what they would; jax's kernel does where scores would need more memory than a chip has."""

    def kernels(*args):
        return re.findall(r"name=((?:flash|splash)_\w+)", str(program("tpu", *args)))

    for allowed in (frozenset(), {"attention 72", "feed-forward 320"}):
        assert not kernels(allowed)
        assert [name[:6] for name in kernels(allowed, attention.SPLASH_FROM)] == ["splash"]
    assert kernels({"attention 64"}, attention.SPLASH_FROM) == ["flash_forward_d64"]


def test_the_mesh_decides_and_not_this_machine():
    """Each device runs its own images: the kernel is inside a shard_map over both axes."""
    for device, causal, kernels in (("tpu", False, 1), ("cpu", False, 0), ("tpu", True, 0)):
        assert str(program(device, causal=causal)).count("pallas_call[") == kernels
    maps = [e for e in program("tpu").jaxpr.eqns if e.primitive.name == "shard_map"]
    assert len(maps) == 1
    # q, k, v are last, after the small tables of the mask, which are replicated.
    assert maps[0].params["in_specs"][-3:] == (P(("data", "fsdp")),) * 3
    assert [v.aval.shape[0] for v in maps[0].params["jaxpr"].invars[-3:]] == [2] * 3
