"""GELU and GEGLU in bfloat16 against float64, for the whole range; in float32 the formula of `jax.nn.gelu`."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rounded

from diva_jax.models.layers import geglu, gelu

CDF = np.vectorize(lambda x: 0.5 * math.erfc(-x / math.sqrt(2)))


def generated(seed):
    rng = np.random.default_rng(seed)
    shape = (3, 41, 2 * 57)
    x = rng.normal(size=shape) * rng.choice([0.01, 1.0, 4.0, 30.0], size=shape)
    dy = rng.normal(size=(*shape[:-1], 57))
    return (jnp.asarray(a, jnp.bfloat16) for a in (x, dy))


@pytest.mark.parametrize("seed", range(3))
def test_bfloat16(seed):
    """Values and gradients are within the rounding of the result and the fit's error of 4e-6 (density: 1e-5).

    They are no worse than with `jax.nn.gelu` in bfloat16 throughout.
    """
    x, dy = generated(seed)
    y, pull = jax.vjp(geglu, x)
    assert y.dtype == jnp.bfloat16 and y.shape == dy.shape
    value, gate, d = (np.asarray(a, np.float64) for a in (*np.split(np.asarray(x, np.float64), 2, -1), dy))
    cdf, density = CDF(gate), np.exp(-gate * gate / 2) / math.sqrt(2 * math.pi)
    fit = np.minimum(np.abs(gate), 6) + 1
    got = np.split(np.asarray(pull(dy)[0], np.float64), 2, -1)
    for found, want, size in (
        (np.asarray(y, np.float64), value * gate * cdf, value),
        (got[0], d * gate * cdf, d),
        (got[1], d * value * (cdf + gate * density), d * value),
    ):
        rounded(found, want, 2**-8, 1e-5, scale=np.abs(size) * fit)
    plain = np.asarray(jnp.split(x, 2, -1)[0] * jax.nn.gelu(jnp.split(x, 2, -1)[1], approximate=False), np.float64)
    want = value * gate * cdf
    assert np.linalg.norm(np.asarray(y, np.float64) - want) <= np.linalg.norm(plain - want)


@pytest.mark.parametrize("seed", range(2))
def test_gelu_in_bfloat16(seed):
    """As above, and no worse than with `jax.nn.gelu` in bfloat16."""
    x, dy = next(generated(seed)), next(generated(seed + 10))
    wide, d = (np.asarray(a, np.float64) for a in (x, dy))
    cdf, density = CDF(wide), np.exp(-wide * wide / 2) / math.sqrt(2 * math.pi)
    results = []
    for fn in (gelu, lambda x: jax.nn.gelu(x, approximate=False)):
        y, pull = jax.vjp(fn, x)
        assert y.dtype == pull(dy)[0].dtype == jnp.bfloat16
        results.append([np.asarray(a, np.float64) for a in (y, pull(dy)[0])])
    wanted = wide * cdf, d * (cdf + wide * density)
    for found, theirs, want in zip(*results, wanted, strict=True):
        rounded(found, want, 2**-8, 6e-5, scale=np.maximum(np.abs(d), 1))
        assert np.linalg.norm(found - want) <= np.linalg.norm(theirs - want)


def test_float32_is_the_formula():
    x = generated(0).__next__().astype(jnp.float32)
    value, gate = jnp.split(x, 2, -1)
    np.testing.assert_array_equal(geglu(x), value * jax.nn.gelu(gate, approximate=False))
    np.testing.assert_array_equal(gelu(x), jax.nn.gelu(x, approximate=False))


def test_extreme_gates_are_finite():
    x = jnp.asarray([[1.0, 1.0, 1.0, 1e30, -1e30, 0.0]], jnp.bfloat16)
    y, pull = jax.vjp(geglu, x)
    np.testing.assert_array_equal(
        np.asarray(y, np.float32), np.asarray(jnp.asarray([[1e30, 0, 0]], jnp.bfloat16), np.float32)
    )
    assert np.all(np.isfinite(np.asarray(pull(jnp.ones_like(y))[0], np.float32)))
