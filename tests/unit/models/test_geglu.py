"""GELU and GEGLU in bfloat16 against float64, for the whole range; in float32 the formula of `jax.nn.gelu`."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rounded

from diva_jax.models.layers import geglu, gelu

CDF = np.vectorize(lambda x: 0.5 * math.erfc(-x / math.sqrt(2)))


def plain_gelu(x):
    return jax.nn.gelu(x, approximate=False)


def plain_geglu(x):
    value, gate = jnp.split(x, 2, -1)
    return value * plain_gelu(gate)


def generated(seed, width):
    rng = np.random.default_rng(seed)
    shape = (3, 41, width)
    return jnp.asarray(rng.normal(size=shape) * rng.choice([0.01, 1.0, 4.0, 30.0], size=shape), jnp.bfloat16)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ours, plain", [(geglu, plain_geglu), (gelu, plain_gelu)], ids=["geglu", "gelu"])
def test_bfloat16(ours, plain, seed):
    """Values and gradients are within the rounding of the result and the fit's error of 4e-6 (density: 1e-5).

    Values are no worse than with `jax.nn.gelu` in bfloat16 throughout, and so is GELU's gradient.
    """
    x = generated(seed, 2 * 57)
    dy = generated(seed + 10, 57 if ours is geglu else 2 * 57)
    results = []
    for fn in (ours, plain):
        y, pull = jax.vjp(fn, x)
        (dx,) = pull(dy)
        assert y.dtype == dx.dtype == jnp.bfloat16 and y.shape == dy.shape
        results.append([np.asarray(a, np.float64) for a in (y, dx)])
    wide, d = (np.asarray(a, np.float64) for a in (x, dy))
    value, gate = np.split(wide, 2, -1) if ours is geglu else (np.ones_like(wide), wide)
    cdf, density = CDF(gate), np.exp(-gate * gate / 2) / math.sqrt(2 * math.pi)
    fit = np.minimum(np.abs(gate), 6) + 1
    parts, scales = [d * value * (cdf + gate * density)], [np.abs(d * value) * fit]
    if ours is geglu:
        parts, scales = [d * gate * cdf, *parts], [np.abs(d) * fit, *scales]
    wanted = value * gate * cdf, np.concatenate(parts, -1)
    for found, want, scale in zip(results[0], wanted, (np.abs(value) * fit, np.concatenate(scales, -1)), strict=True):
        rounded(found, want, 2**-8, 1e-5, scale=scale)
    for found, theirs, want in [*zip(*results, wanted, strict=True)][: 1 if ours is geglu else 2]:
        assert np.linalg.norm(found - want) <= np.linalg.norm(theirs - want)


def test_float32_is_the_formula():
    x = generated(0, 2 * 57).astype(jnp.float32)
    np.testing.assert_array_equal(geglu(x), plain_geglu(x))
    np.testing.assert_array_equal(gelu(x), plain_gelu(x))


def test_extreme_gates_are_finite():
    x = jnp.asarray([[1.0, 1.0, 1.0, 1e30, -1e30, 0.0]], jnp.bfloat16)
    y, pull = jax.vjp(geglu, x)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.float32(jnp.asarray([[1e30, 0, 0]], jnp.bfloat16)))
    assert np.all(np.isfinite(np.asarray(pull(jnp.ones_like(y))[0], np.float32)))
