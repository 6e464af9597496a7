"""Layers shared by all models, with one definition of dtypes, epsilons and attention."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from diva_jax.models.attention import attention as attention
from diva_jax.models.platform import Array, traced_for


def widened(x: Array) -> Array:
    """The array in float32 or wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class LayerNorm(nnx.LayerNorm):
    """Flax's LayerNorm with the name "norm" in profiles and compiled programs."""

    __call__ = jax.named_scope("norm")(nnx.LayerNorm.__call__)


class GroupNorm(nnx.GroupNorm):
    """Flax's GroupNorm with the name "norm" in profiles and compiled programs."""

    __call__ = jax.named_scope("norm")(nnx.GroupNorm.__call__)


class Matrix(nnx.Module):
    """x @ W in `dtype`, [..., n_in] -> [..., n_out]: a projection whose weight PyTorch holds as [n_in, n_out] too."""

    def __init__(self, matrix: nnx.Param, dtype):
        self.matrix, self.dtype = matrix, dtype

    def __call__(self, x: Array) -> Array:
        return x @ self.matrix[...].astype(self.dtype)


class Keys:
    """A replacement for `nnx.Rngs` whose n-th key, counted from 1, is `fold_in(key(seed), n)`. The counter is a Python
    integer. The counters of `nnx.Rngs` are arrays, which makes tracing quadratic in the number of parameters."""

    def __init__(self, seed: int = 0):
        self._key, self._count = jax.random.key(seed), 0

    def params(self) -> Array:
        """Returns the next key."""
        self._count += 1
        return jax.random.fold_in(self._key, self._count)


def abstract(make: Callable[[Keys], nnx.Module]) -> nnx.Module:
    """Returns the module that `make(rngs)` builds, with shapes and dtypes instead of arrays, for a loader to fill."""
    return nnx.eval_shape(lambda: make(Keys()))


@dataclasses.dataclass(frozen=True)
class Layers:
    """Makes layers that share dtypes: `dtype` of activations, `param_dtype` of weights; `rngs` makes initial values.
    The statistics of norms and the softmax of attention are computed in at least float32."""

    rngs: nnx.Rngs
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @property
    def _kw(self):
        return dict(dtype=self.dtype, param_dtype=self.param_dtype, rngs=self.rngs)

    def linear(self, n_in: int, n_out: int, bias: bool = True) -> nnx.Linear:
        """[..., n_in] -> [..., n_out]."""
        return nnx.Linear(n_in, n_out, use_bias=bias, **self._kw)

    def conv(self, n_in: int, n_out: int, size: int, stride: int = 1, padding=0, bias: bool = True) -> nnx.Conv:
        """[B, H, W, n_in] -> [B, H', W', n_out]; `padding` as ((top, bottom), (left, right)) or one number."""
        options = dict(padding=padding, use_bias=bias, conv_general_dilated=convolve)
        return nnx.Conv(n_in, n_out, (size, size), stride, **options, **self._kw)

    @property
    def _norm_kw(self):
        # The variance as E[x^2] - E[x]^2 needs one pass over x instead of two, and the compiler makes it part of the
        # operation that makes x. In float32 it is not accurate enough for parity. In 16 bits the rounding of x itself
        # has the larger effect, for every ratio of mean and deviation (tests/unit/models/test_layers.py).
        return self._kw | dict(use_fast_variance=jnp.dtype(self.dtype).itemsize == 2)

    def layer_norm(self, n: int, epsilon: float) -> nnx.LayerNorm:
        """LayerNorm over the last axis of [..., n]."""
        return LayerNorm(n, epsilon=epsilon, **self._norm_kw)

    def group_norm(self, n: int, groups: int, epsilon: float) -> nnx.GroupNorm:
        """GroupNorm over [B, H, W, n]; `groups` divides n."""
        return GroupNorm(n, groups, epsilon=epsilon, **self._norm_kw)

    def embed(self, count: int, n: int) -> nnx.Embed:
        """An embedding table: integers [...] below `count` -> [..., n]."""
        return nnx.Embed(count, n, **self._kw)

    def param(self, init: Callable, *shape: int) -> nnx.Param:
        """A single parameter in param_dtype; cast it with `.astype(dtype)` where it is used."""
        return nnx.Param(init(self.rngs.params(), shape, self.param_dtype))


def quick_gelu(x: Array) -> Array:
    """x * sigmoid(1.702 x), OpenAI's approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


# Coefficients of P in Phi(x) = (1 + tanh(x P(x^2))) / 2, Phi being the distribution function of the standard normal
# distribution, fitted for |x| up to _FITTED. The error of x Phi(x) is at most 4e-6.
_NORMAL = (0.797827576685907, 0.0364699305203537, -1.2547603066e-4, -3.0467233810e-5, 1.1126338239e-6)
_FITTED = 5.5


def normal_cdf(x: Array) -> Array:
    """Distribution function of the standard normal distribution; the error of x times it is at most 4e-6."""
    square = jnp.minimum(x * x, _FITTED**2)
    return 0.5 + 0.5 * jnp.tanh(x * functools.reduce(lambda p, c: p * square + c, _NORMAL[::-1]))


def gelu(x: Array) -> Array:
    """GELU, x Phi(x) (arXiv 1606.08415); in 16 bits with `normal_cdf`, as in `geglu`."""
    return _gelu(x) if x.dtype.itemsize == 2 else jax.nn.gelu(x, approximate=False)


@jax.custom_vjp
def _gelu(x: Array) -> Array:
    wide = x.astype(jnp.float32)
    return (wide * normal_cdf(wide)).astype(x.dtype)


def _density(x: Array) -> Array:
    return jnp.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5


def _gelu_backward(x: Array, dy: Array) -> tuple[Array]:
    wide = x.astype(jnp.float32)
    return ((dy.astype(jnp.float32) * (normal_cdf(wide) + wide * _density(wide))).astype(x.dtype),)


_gelu.defvjp(lambda x: (_gelu(x), x), _gelu_backward)


def geglu(x: Array) -> Array:
    """GEGLU (arXiv 2002.05202): the first half of the last axis times the GELU of the second, [..., 2n] -> [..., n]. In
    16 bits, the distribution function in GELU has an error of at most 4e-6, less than the result is rounded by, and
    takes a fraction of the operations of `erfc`. The backward pass computes it anew, once for both halves."""
    if x.dtype.itemsize == 2:
        return _geglu(x)
    value, gate = jnp.split(x, 2, axis=-1)
    return value * gelu(gate)


def _halves(x: Array) -> tuple[Array, Array]:
    value, gate = jnp.split(x, 2, axis=-1)
    return value.astype(jnp.float32), gate.astype(jnp.float32)


@jax.custom_vjp
def _geglu(x: Array) -> Array:
    value, gate = _halves(x)
    return (value * gate * normal_cdf(gate)).astype(x.dtype)


def geglu_gradient(value: Array, gate: Array, dy: Array) -> tuple[Array, Array]:
    """Gradients of value * GELU(gate) with respect to both, for dy of the result; all float32, of one shape."""
    cdf = normal_cdf(gate)
    return dy * gate * cdf, dy * value * (cdf + gate * _density(gate))


def _geglu_backward(x: Array, dy: Array) -> tuple[Array]:
    return (jnp.concatenate(geglu_gradient(*_halves(x), dy.astype(jnp.float32)), axis=-1).astype(x.dtype),)


_geglu.defvjp(lambda x: (_geglu(x), x), _geglu_backward)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}


def heads(x: Array, count: int) -> Array:
    """[B, N, H*D] -> [B, N, H, D]."""
    return x.reshape(*x.shape[:-1], count, x.shape[-1] // count)


def split_qkv(qkv: Array, count: int) -> tuple[Array, Array, Array]:
    """Fused projection [B, N, 3*H*D] -> q, k, v, each [B, N, H, D]."""
    q, k, v = jnp.split(qkv, 3, axis=-1)
    return heads(q, count), heads(k, count), heads(v, count)


# XLA's CPU compiler brings convolutions into the layout of its fast code outside of loops alone (jax-ml/jax, issue
# 12868). Within a loop over draws or micro-batches JAX's gradients are 5 to 50 times slower than those written here in
# that layout. Programs for other devices are those of `jax.lax.conv_general_dilated`, but for `convolve_once`.
Padding = tuple[tuple[int, int], ...]
_channels_last = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _fast(x: Array, kernel: Array, strides: tuple[int, ...], padding: Padding, precision, once: bool = False) -> Array:
    """[B, H, W, in], [h, w, in, out] -> [B, H', W', out]; `once` as in `convolve_once`."""
    return _channels_last(x, kernel, strides, padding, precision=precision)


def _turned(kernel: Array) -> Array:
    for axis in (0, 1):
        kernel = jnp.concatenate(jnp.split(kernel, kernel.shape[axis], axis)[::-1], axis)
    return kernel


def _convolve_backward(strides, padding, precision, once, given, g):
    x, kernel = given
    sizes = list(zip(x.shape[1:3], kernel.shape[:2], g.shape[1:3], strides, padding, strict=True))
    # Gradient of the input: a convolution of g, with zeros between its rows, with the flipped kernel.
    around = [(k - 1 - low, n + low - (m - 1) * s - 1) for n, k, m, s, (low, _) in sizes]
    turned = (_turned(kernel) if once else kernel[::-1, ::-1]).swapaxes(2, 3)
    to_x = _channels_last(g, turned, (1, 1), around, lhs_dilation=strides, precision=precision)
    # Gradient of the kernel: a convolution in which the axes of images and channels are exchanged.
    around = [(low, (m - 1) * s + k - n - low) for n, k, m, s, (low, _) in sizes]
    x, g = x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)
    to_kernel = _channels_last(x, g, (1, 1), around, rhs_dilation=strides, precision=precision)
    return to_x, to_kernel.transpose(1, 2, 0, 3)


_fast.defvjp(lambda x, kernel, *how: (_fast(x, kernel, *how), (x, kernel)), _convolve_backward)


def convolve_once(x: Array, kernel: Array, padding: Padding) -> Array:
    """As `convolve` on CPUs, without strides. What the backward pass makes of a frozen kernel it makes once, and not in
    each turn of a loop: XLA moves a concatenation out of loops, but not a reversal."""
    return _fast(x, kernel, (1, 1), padding, None, True)


def convolve(x: Array, kernel: Array, strides: Sequence[int], padding: Padding, *, precision=None, **others) -> Array:
    """`jax.lax.conv_general_dilated` for the `nnx.Conv` of `Layers`, channels last, with the gradients above on CPUs.
    There, `others` say no more than that nothing is dilated and no channels are grouped."""
    if traced_for() == "cpu":
        return _fast(x, kernel, tuple(strides), tuple(map(tuple, padding)), precision)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, precision=precision, **others)
