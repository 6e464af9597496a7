"""Products with frozen weights in int8: weights by output channel, activations by token, sums in int32.

A matrix unit multiplies int8 at twice the rate of bfloat16. The weights are quantized once, `quantize`, and hold one
scale per output channel; what they are multiplied with is quantized at each call, with one scale per token (LLM.int8(),
arXiv 2208.07339, section 2, without its outliers). The gradient reaches the input alone: its product with the weights
transposed is in int8 too, and the scales of the output channels are then a factor of the gradient before it is
quantized.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diva_jax.models.layers import Array, Layers

INT8 = "int8"  # The value of `config.frozen_quantization`.
_MOST = 127.0


class Quantized(NamedTuple):
    """A matrix W in int8.

    Attributes:
      values: [n_in, n_out], int8, -127 to 127.
      scales: [n_out], float32: W is about values * scales.
    """

    values: Array
    scales: Array


def _rounded(x: Array, axis: int) -> tuple[Array, Array]:
    """x in float32 -> (int8 of x's shape, scales of length 1 along `axis`); zeros have a scale of 0."""
    scales = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / _MOST
    return jnp.round(x / jnp.where(scales > 0, scales, 1)).astype(jnp.int8), scales


def quantize(weight: Array) -> Quantized:
    """Quantizes the weight of a linear layer.

    Args:
      weight: [..., n_in, n_out], floats; axes before these, as a 1x1 convolution has them, have length 1.
    """
    values, scales = _rounded(weight.reshape(weight.shape[-2:]).astype(jnp.float32), 0)
    return Quantized(values, scales[0])


def _product(x: Array, values: Array, axis: int) -> Array:
    """x [..., n], floats, times int8 values summed over their `axis` -> [..., m], float32."""
    rounded, scales = _rounded(x.astype(jnp.float32), -1)
    dims = (((x.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(rounded, values, dims, preferred_element_type=jnp.int32).astype(jnp.float32) * scales


@jax.custom_vjp
def product(x: Array, weight: Quantized) -> Array:
    """x @ W in int8.

    The error of an element is at most sum_i (|x_i| t / 2 + |W_i| s / 2 + s t / 4) where s is the token's largest |x_i|
    / 127 and t the scale of the output channel.

    Args:
      x: [..., n_in], floats.
      weight: W, of which no gradient is computed.

    Returns:
      [..., n_out], in the dtype of x.
    """
    return (_product(x, weight.values, 0) * weight.scales).astype(x.dtype)


def _backward(weight: Quantized, dy: Array) -> tuple[Array, None]:
    return _product(dy.astype(jnp.float32) * weight.scales, weight.values, 1).astype(dy.dtype), None


product.defvjp(lambda x, weight: (product(x, weight), weight), _backward)


class Linear(nnx.Linear):
    """Flax's linear layer, whose product is in int8 where its kernel is held as `Quantized`."""

    def __call__(self, x: Array) -> Array:
        return _apply(self, x) if _is_quantized(self) else super().__call__(x)


class Pointwise(nnx.Conv):
    """Flax's 1x1 convolution with stride 1, whose product is in int8 where its kernel is held as `Quantized`."""

    def __call__(self, x: Array) -> Array:
        return _apply(self, x) if _is_quantized(self) else super().__call__(x)


def _is_quantized(layer: nnx.Linear | nnx.Conv) -> bool:
    return isinstance(layer.kernel.get_value(), Quantized)


def _apply(layer: nnx.Linear | nnx.Conv, x: Array) -> Array:
    y = product(x.astype(layer.dtype), layer.kernel.get_value())
    return y if layer.bias is None else y + layer.bias[...].astype(y.dtype)


class QuantizableLayers(Layers):
    """Makes layers of a model that may be frozen: the weights of products can be replaced by `quantize` of them."""

    def linear(self, n_in: int, n_out: int, bias: bool = True) -> Linear:
        return Linear(n_in, n_out, use_bias=bias, **self._kw)

    def conv(self, n_in: int, n_out: int, size: int, stride: int = 1, padding=0, bias: bool = True) -> nnx.Conv:
        if size == 1 and stride == 1 and padding == 0:
            return Pointwise(n_in, n_out, (1, 1), padding=((0, 0), (0, 0)), use_bias=bias, **self._kw)
        return super().conv(n_in, n_out, size, stride, padding, bias)
