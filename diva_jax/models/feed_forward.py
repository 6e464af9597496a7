"""The residual feed-forward layer of a transformer block: a kernel for TPUs where it is faster, else its modules.

The choice is made while a function is traced, by the platform that it is traced for (`platform.py`).
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from diva_jax.models.kernels.tiles import LANES, by_device
from diva_jax.models.platform import allowed, traced_for

Array = jax.Array

# Smallest number of tokens for which the kernel is used. With fewer of them and more channels, as in the U-Net's deeper
# levels, XLA's own operations are near the bound of the matrix unit, and the weights do not fit into VMEM.
MIN_TOKENS = 512


def _kernel():
    """The module `models/kernels/feed_forward.py`, imported where it is traced, since Pallas takes 50 ms."""
    from diva_jax.models.kernels import feed_forward as module

    return module


def use_kernel(shape: tuple[int, int, int], hidden: int, dtype) -> bool:
    """Returns whether tokens of this shape, (B, N, C), and dtype use the kernel, traced for the mesh that is set."""
    mesh, (batch, tokens, channels) = jax.sharding.get_abstract_mesh(), shape
    if traced_for(mesh) != "tpu" or jnp.dtype(dtype).itemsize != 2 or batch % mesh.size or tokens < MIN_TOKENS:
        return False
    kernel = _kernel()
    return tokens % LANES == hidden % LANES == 0 and channels <= max(kernel.TILES) and kernel.fits()


def _plain(x: Array, norm: nnx.LayerNorm, layer: nnx.Module) -> Array:
    return x + layer(norm(x))


def _weights(state, graph, dtype) -> tuple[tuple[Array, ...], float]:
    """Returns the weights in the order of the kernel, and the epsilon of the norm."""
    norm, layer = nnx.merge(graph, state)
    affine = [w for linear in (layer.proj, layer.out) for w in (linear.kernel[...].astype(dtype), linear.bias[...])]
    return (norm.scale[...], norm.bias[...], *affine), norm.epsilon


def _run(kernel, arrays: list[Array], weights: tuple[Array, ...], interpret: bool):
    """Calls kernel(*arrays, weights) with [B, C, N] in place of [B, N, C], on each device."""

    def local(*given):
        return kernel(*given[: len(arrays)], given[len(arrays) :])

    arrays = [a.swapaxes(1, 2) for a in arrays]
    out = local(*arrays, *weights) if interpret else by_device(local, *arrays, whole=weights)
    return jax.tree.map(lambda a: a.swapaxes(1, 2), out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def fused(x: Array, state: nnx.State, graph: nnx.GraphDef, interpret: bool) -> Array:
    """`feed_forward` with the kernel, of `nnx.split((norm, layer))`; `interpret` interprets it on a CPU, for tests. N
    and the number of hidden units are multiples of LANES."""
    return _forward(x, state, graph, interpret, save=False)[0]


def _forward(x, state, graph, interpret, save):
    weights, epsilon = _weights(state, graph, x.dtype)
    kernel = functools.partial(_kernel().forward, epsilon=epsilon, save=save, interpret=interpret)
    return _run(kernel, [x], weights, interpret)


def _forward_saved(x, state, graph, interpret):
    out, projection = _forward(x, state, graph, interpret, save=True)
    return out, (x, projection, state)


def _backward(graph, interpret, saved, dy):
    x, projection, state = saved
    weights, epsilon = _weights(state, graph, x.dtype)
    kernel = functools.partial(_kernel().backward, epsilon=epsilon, interpret=interpret)
    dx = _run(kernel, [x, projection, dy], weights, interpret)
    # Weights are frozen where the kernel is used today, and then XLA removes this computation.
    _, pull = jax.vjp(lambda state: _plain(x, *nnx.merge(graph, state)), state)
    return dx, *pull(dy)


fused.defvjp(_forward_saved, _backward)


def feed_forward(x: Array, norm: nnx.LayerNorm, layer: nnx.Module) -> Array:
    """x + layer(norm(x)) of tokens [B, N, C]. `norm` is a LayerNorm of C channels with scale and bias; `layer` is
    `proj`, a linear layer from C channels to 2H, GEGLU, and `out`, one from H to C."""
    if allowed(f"feed-forward {x.shape[2]}") and use_kernel(x.shape, layer.out.in_features, x.dtype):
        graph, state = nnx.split((norm, layer))
        with jax.named_scope("feed_forward"):
            return fused(x, state, graph, False)
    return _plain(x, norm, layer)
