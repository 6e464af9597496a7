"""int8 products: within their bound of the float products, and without effect where weights are floats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diva_jax.models.layers import Keys, Layers
from diva_jax.models.quantized import Linear, Pointwise, QuantizableLayers, Quantized, product, quantize


def bound(x, w):
    """The documented bound of the error of `product`, [..., n_out], float64."""
    s = np.abs(x).max(-1, keepdims=True) / 127
    t = np.abs(w).max(0) / 127
    return np.abs(x).sum(-1, keepdims=True) * t / 2 + np.abs(w).sum(0) * s / 2 + len(w) * s * t / 4


def generated(seed):
    """A token matrix with outliers and a weight whose channels differ in size."""
    rng = np.random.default_rng(seed)
    n_in, n_out = (int(n) for n in rng.integers(1, 150, 2))
    lead = tuple(int(n) for n in rng.integers(1, 6, rng.integers(1, 4)))
    x = rng.normal(size=(*lead, n_in)) * np.exp(2 * rng.normal(size=(*lead, 1)))
    x[..., 0] *= 10
    return x.astype(np.float32), (rng.normal(size=(n_in, n_out)) * np.exp(rng.normal(size=n_out))).astype(np.float32)


@pytest.mark.parametrize("seed", range(12))
def test_product_and_gradient(seed):
    x, w = generated(seed)
    q = quantize(jnp.asarray(w))
    y, pull = jax.vjp(lambda x: product(x, q), jnp.asarray(x))
    exact = x.astype(np.float64) @ w
    assert np.all(np.abs(y - exact) <= 1.0001 * bound(x, w) + 1e-6)
    dy = np.random.default_rng(seed).normal(size=exact.shape).astype(np.float32)
    # With the gradient, the scales of the output channels are part of what is quantized by token.
    held, wide = np.asarray(q.values, np.float64), dy * np.asarray(q.scales)
    error = np.abs(pull(jnp.asarray(dy))[0] - wide @ held.T)
    assert np.all(error <= np.abs(held).sum(1) * np.abs(wide).max(-1, keepdims=True) / 254 * 1.0001 + 1e-6)


def test_the_quantized_weight_is_within_half_a_step():
    _, w = generated(3)
    q = quantize(jnp.asarray(w))
    assert q.values.dtype == jnp.int8 and q.scales.dtype == jnp.float32 and q.scales.shape == w.shape[1:]
    assert np.all(np.abs(q.values * q.scales - w) <= q.scales * 0.5001)
    assert np.all(np.abs(np.asarray(q.values)).max(0) == 127)  # Every channel uses the whole range.


def test_zeros_give_zeros():
    """A padded token, or an output channel without weights, has no scale to divide by."""
    w = jnp.ones((5, 3)).at[:, 1].set(0)
    x = jnp.ones((2, 5)).at[0].set(0)
    y, pull = jax.vjp(lambda x: product(x, quantize(w)), x)
    np.testing.assert_allclose(y, x @ w, rtol=1e-6)
    assert not np.any(pull(jnp.zeros_like(y))[0])


def test_no_gradient_reaches_the_weight():
    x, w = generated(1)
    q = quantize(jnp.asarray(w))
    grads = jax.grad(lambda scales: jnp.sum(product(jnp.asarray(x), Quantized(q.values, scales))))(q.scales)
    assert not np.any(grads)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layers(dtype):
    """With float kernels they are Flax's, bit for bit; with quantized ones, the product and the bias."""
    ours, plain = (kind(Keys(3), dtype, dtype) for kind in (QuantizableLayers, Layers))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5, 7)), dtype)
    for mine, theirs in ((ours.linear(7, 9), plain.linear(7, 9)), (ours.conv(7, 9, 1), plain.conv(7, 9, 1))):
        theirs.kernel, theirs.bias = mine.kernel, nnx.Param(jnp.arange(9, dtype=dtype))
        mine.bias = theirs.bias
        assert isinstance(mine, Linear | Pointwise)
        np.testing.assert_array_equal(mine(x), theirs(x))
        mine.kernel = nnx.Param(quantize(mine.kernel[...]))
        got, want = mine(x), product(x, mine.kernel.get_value()) + theirs.bias[...]
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, want)
        assert np.any(got != theirs(x))
    assert type(ours.conv(7, 9, 3, padding=1)) is type(ours.conv(7, 9, 1, stride=2)) is nnx.Conv
