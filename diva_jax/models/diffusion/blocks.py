"""Residual, transformer and resampling blocks of the U-Net and the VAE, with the names of diffusers. The feed-forward
layer has a kernel for TPUs, where that is faster for the platform that it is traced for (`platform.py`)."""

import functools
import operator

import jax
import jax.numpy as jnp
from flax import nnx

from diva_jax.models.attention import attention
from diva_jax.models.layers import Array, Layers, convolve_once, geglu, heads
from diva_jax.models.platform import LANES, allowed, by_device, traced_for

# Smallest number of tokens for which the kernel is used. With fewer of them and more channels, as in the U-Net's deeper
# levels, XLA's own operations are near the bound of the matrix unit, and the weights do not fit into VMEM.
MIN_TOKENS = 512


def use_kernel(shape: tuple[int, int, int], hidden: int, dtype) -> bool:
    """Returns whether tokens of this shape, (B, N, C), and dtype use the kernel, traced for the mesh that is set."""
    mesh, (batch, tokens, channels) = jax.sharding.get_abstract_mesh(), shape
    if traced_for(mesh) != "tpu" or jnp.dtype(dtype).itemsize != 2 or batch % mesh.size or tokens < MIN_TOKENS:
        return False
    from diva_jax.models import kernels  # Here, where it is traced, since Pallas takes 50 ms.

    return tokens % LANES == hidden % LANES == 0 and channels <= max(kernels.TILES) and kernels.fits()


def _plain(x: Array, norm: nnx.LayerNorm, layer: nnx.Module) -> Array:
    return x + layer(norm(x))


def _run(name: str, arrays: list[Array], state, graph, interpret: bool, **options):
    """The function `name` of `models/kernels.py`, of arrays [B, C, N] in place of [B, N, C], on each device."""
    from diva_jax.models import kernels

    norm, layer = nnx.merge(graph, state)
    dtype, kernel = arrays[0].dtype, getattr(kernels, name)
    affine = [w for linear in (layer.proj, layer.out) for w in (linear.kernel[...].astype(dtype), linear.bias[...])]
    weights = (norm.scale[...], norm.bias[...], *affine)

    def local(*given):
        tokens, weights = given[: len(arrays)], given[len(arrays) :]
        return kernel(*tokens, weights, epsilon=norm.epsilon, interpret=interpret, **options)

    arrays = [a.swapaxes(1, 2) for a in arrays]
    out = local(*arrays, *weights) if interpret else by_device(local, *arrays, whole=weights)
    return jax.tree.map(lambda a: a.swapaxes(1, 2), out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def fused(x: Array, state: nnx.State, graph: nnx.GraphDef, interpret: bool) -> Array:
    """`feed_forward` with the kernel, of `nnx.split((norm, layer))`; `interpret` interprets it on a CPU, for tests. N
    and the number of hidden units are multiples of LANES."""
    return _run("feed_forward", [x], state, graph, interpret, save=False)[0]


def _forward(x, state, graph, interpret):
    out, projection = _run("feed_forward", [x], state, graph, interpret, save=True)
    return out, (x, projection, state)


def _backward(graph, interpret, saved, dy):
    x, projection, state = saved
    dx = _run("feed_backward", [x, projection, dy], state, graph, interpret)
    # Weights are frozen where the kernel is used today, and then XLA removes this computation.
    _, pull = jax.vjp(lambda state: _plain(x, *nnx.merge(graph, state)), state)
    return dx, *pull(dy)


fused.defvjp(_forward, _backward)


def feed_forward(x: Array, norm: nnx.LayerNorm, layer: nnx.Module) -> Array:
    """x + layer(norm(x)) of tokens [B, N, C]. `norm` is a LayerNorm of C channels with scale and bias; `layer` is
    `proj`, a linear layer from C channels to 2H, GEGLU, and `out`, one from H to C."""
    if allowed(f"feed-forward {x.shape[2]}") and use_kernel(x.shape, layer.out.in_features, x.dtype):
        graph, state = nnx.split((norm, layer))
        with jax.named_scope("feed_forward"):
            return fused(x, state, graph, False)
    return _plain(x, norm, layer)


def call(block: nnx.Module, *args: Array, remat: bool = False) -> Array:
    """Returns `block(*args)`; with `remat`, its activations are recomputed in the backward pass instead of stored."""
    # jax.checkpoint is used because nnx.remat updates the block's variables. That fails for variables that were created
    # outside of the differentiated function, such as frozen weights.
    return jax.checkpoint(operator.call)(block, *args) if remat else block(*args)


class ResnetBlock(nnx.Module):
    """Two 3x3 convolutions with a residual; a time embedding of width `time_dim`, if any, is added between them."""

    def __init__(self, n_in: int, n_out: int, groups: int, epsilon: float, layers: Layers, time_dim: int | None = None):
        self.norm1 = layers.group_norm(n_in, groups, epsilon)
        self.conv1 = layers.conv(n_in, n_out, 3, padding=1)
        if time_dim is not None:
            self.time_emb_proj = layers.linear(time_dim, n_out)
        self.norm2 = layers.group_norm(n_out, groups, epsilon)
        self.conv2 = layers.conv(n_out, n_out, 3, padding=1)
        self.has_shortcut = n_in != n_out
        if self.has_shortcut:
            self.conv_shortcut = layers.conv(n_in, n_out, 1)

    def __call__(self, x: Array, time: Array | None = None) -> Array:
        """[B, H, W, n_in], [B, time_dim] -> [B, H, W, n_out]."""
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        if time is not None:
            y = y + self.time_emb_proj(jax.nn.silu(time))[:, None, None]
        return (self.conv_shortcut(x) if self.has_shortcut else x) + self.conv2(jax.nn.silu(self.norm2(y)))


class Downsample(nnx.Module):
    """3x3 convolution with stride 2; padding (before, after) on both axes is (1, 1) in the U-Net, (0, 1) in the VAE."""

    def __init__(self, n: int, padding: tuple[int, int], layers: Layers):
        self.conv = layers.conv(n, n, 3, stride=2, padding=(padding, padding))

    def __call__(self, x: Array) -> Array:
        """[B, H, W, n] -> [B, H/2, W/2, n]; sizes are rounded up for padding (1, 1) and down for (0, 1)."""
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbour upsampling by two, cropped to a size that may be odd, then a 3x3 convolution."""

    def __init__(self, n: int, layers: Layers):
        self.conv = layers.conv(n, n, 3, padding=1)

    def __call__(self, x: Array, size: tuple[int, int]) -> Array:
        """[B, H, W, n] -> [B, *size, n]; size[0] is 2H or 2H - 1, size[1] is 2W or 2W - 1."""
        batch, height, width, n = x.shape
        if size != (2 * height, 2 * width):
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            return self.conv(x[:, : size[0], : size[1]])
        # The nine taps of an output pixel see 2 x 2 pixels of x. With the weights of each of these added up first, four
        # convolutions, for even and odd rows and columns, make 4/9 of the products. The sums are in the dtype of the
        # convolution, because XLA does not move an operation that makes the weights larger out of loops.
        conv, rows = self.conv, []
        x, kernel = x.astype(conv.dtype), conv.kernel[...].astype(conv.dtype)
        for dy, of_rows in enumerate(_pairs(kernel, 0)):
            around = [((1 - dy, dy), (1 - dx, dx)) for dx in (0, 1)]
            columns = [convolve_once(x, k, p) for k, p in zip(_pairs(of_rows, 1), around, strict=True)]
            rows.append(jnp.concatenate(columns, axis=-1).reshape(batch, height, 1, 2 * width, n))
        return jnp.concatenate(rows, axis=2).reshape(batch, *size, n) + conv.bias[...].astype(conv.dtype)


def _pairs(kernel: Array, axis: int) -> tuple[Array, Array]:
    """The weights of an even and of an odd output for the two inputs that its three taps see."""
    before, at, after = jnp.split(kernel, 3, axis)
    return jnp.concatenate([before, at + after], axis), jnp.concatenate([before + at, after], axis)


class ContextAttention(nnx.Module):
    """Attention of tokens to a context, with `count` heads; the output's projection has a bias whatever `bias` is."""

    def __init__(self, n: int, n_context: int, count: int, layers: Layers, bias: bool = False):
        self.count = count
        self.to_q = layers.linear(n, n, bias)
        self.to_k, self.to_v = layers.linear(n_context, n, bias), layers.linear(n_context, n, bias)
        self.to_out = nnx.List([layers.linear(n, n)])

    def __call__(self, x: Array, context: Array) -> Array:
        """[B, N, n], [B, M, n_context] -> [B, N, n]."""
        q, k, v = (heads(t, self.count) for t in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out[0](attention(q, k, v))


class FeedForward(nnx.Module):
    """Projection, GEGLU, projection; hidden width 4n."""

    def __init__(self, n: int, layers: Layers):
        self.proj = layers.linear(n, 8 * n)
        self.out = layers.linear(4 * n, n)

    def __call__(self, x: Array) -> Array:
        """[B, N, n] -> [B, N, n]."""
        return self.out(geglu(self.proj(x)))


class TransformerBlock(nnx.Module):
    """Self-attention, attention to a context and feed-forward, each after a LayerNorm and with a residual."""

    def __init__(self, n: int, n_context: int, count: int, layers: Layers):
        self.norm1 = layers.layer_norm(n, 1e-5)
        self.attn1 = ContextAttention(n, n, count, layers)
        self.norm2 = layers.layer_norm(n, 1e-5)
        self.attn2 = ContextAttention(n, n_context, count, layers)
        self.norm3 = layers.layer_norm(n, 1e-5)
        self.ff = FeedForward(n, layers)

    def __call__(self, x: Array, context: Array) -> Array:
        """[B, N, n], [B, M, n_context] -> [B, N, n]."""
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        return feed_forward(x + self.attn2(self.norm2(x), context), self.norm3, self.ff)


class Transformer(nnx.Module):
    """One transformer block over a feature map's pixels with a residual, between projections that are linear layers
    (Stable Diffusion 2) or, where `linear` is false, 1x1 convolutions (1.x)."""

    def __init__(self, n: int, n_context: int, count: int, groups: int, linear: bool, layers: Layers):
        def project():
            return layers.linear(n, n) if linear else layers.conv(n, n, 1)

        # This epsilon is fixed in diffusers; norm_eps of the U-Net's config does not apply to it.
        self.norm = layers.group_norm(n, groups, 1e-6)
        self.linear = linear
        self.proj_in = project()
        self.transformer_blocks = nnx.List([TransformerBlock(n, n_context, count, layers)])
        self.proj_out = project()

    def __call__(self, x: Array, context: Array) -> Array:
        """[B, H, W, n], [B, M, n_context] -> [B, H, W, n]."""
        y = self.proj_in(self.norm(x))
        y = y.reshape(y.shape[0], -1, y.shape[-1])  # [B, H*W, n]
        y = self.transformer_blocks[0](y, context)
        # Before the reshape where it can be: on TPUs the product then reads the layout of the kernels without a copy.
        y = self.proj_out(y).reshape(x.shape) if self.linear else self.proj_out(y.reshape(x.shape))
        return x + y
