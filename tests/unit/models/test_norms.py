"""Norms in bfloat16, whose variance is E[x^2] - E[x]^2: no less accurate than with a variance in two passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close

from diva_jax.models.layers import Keys, Layers

RATIOS = (0.0, 1.0, 10.0, 100.0)  # Mean by standard deviation.


def made(kind: str, n: int, fast: bool | None):
    layers = Layers(Keys(), jnp.bfloat16, jnp.bfloat16)
    norm = layers.layer_norm(n, 1e-5) if kind == "layer" else layers.group_norm(n, 3, 1e-5)
    assert norm.use_fast_variance
    if fast is not None:
        norm.use_fast_variance = fast
    return norm


def exact(kind: str, x: np.ndarray) -> np.ndarray:
    shape = x.shape
    if kind == "group":
        x = x.reshape(*shape[:-1], 3, -1)
    axes = (-1,) if kind == "layer" else (1, 2, -1)
    y = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)
    return y.reshape(shape)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("kind", ["layer", "group"])
def test_the_rounding_of_the_input_has_the_larger_effect(kind, ratio):
    """Errors, of values and of their mean size, relative to the norm of the input before it was rounded."""
    rng = np.random.default_rng(int(ratio))
    x = rng.normal(size=(2, 9, 7, 33)) + ratio * rng.choice([-1, 1], size=(2, 1, 1, 1))
    want = exact(kind, x)
    errors = {}
    for fast in (True, False):
        y = np.asarray(jax.jit(made(kind, 33, fast))(jnp.asarray(x, jnp.bfloat16)), np.float64)
        assert np.all(np.isfinite(y))
        errors[fast] = np.linalg.norm(y - want) / np.linalg.norm(want)
    assert errors[True] <= 1.02 * errors[False] + 1e-4


@pytest.mark.parametrize("kind", ["layer", "group"])
def test_gradient(kind):
    """To the input, against the one of a variance in two passes."""
    rng = np.random.default_rng(1)
    x, dy = (jnp.asarray(rng.normal(size=(2, 9, 7, 33)) + 3, jnp.bfloat16) for _ in range(2))
    grads = []
    for fast in (True, False):
        norm = made(kind, 33, fast)
        grads.append(np.asarray(jax.jit(lambda x, norm=norm: jax.vjp(norm, x)[1](dy)[0])(x), np.float64))
    close(*grads, 2e-3)


def test_constant_input_is_finite():
    for kind in ("layer", "group"):
        x = jnp.full((1, 5, 3, 33), 777.0, jnp.bfloat16)
        y, pull = jax.vjp(made(kind, 33, None), x)
        assert np.all(np.isfinite(y)) and np.all(np.isfinite(pull(jnp.ones_like(y))[0]))
