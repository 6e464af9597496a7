"""Losses over pairs, written out in numpy, and the structure and curriculum of SALM."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from diva_jax.objectives import salm
from diva_jax.objectives.shared import pairs


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("seed", range(3))
def test_losses_over_pairs(seed):
    rng = np.random.default_rng(seed)
    b, temperature = rng.integers(3, 8), 0.3
    x, t = rng.normal(size=(b, 5)), rng.normal(size=(b, 7))
    rows = np.exp(unit(x) @ unit(x[::-1]).T / temperature)
    logits = pairs.cosines(jnp.asarray(x), jnp.asarray(x[::-1].copy())) / temperature
    want = [-np.log(np.diagonal(rows / rows.sum(axis=a, keepdims=True))).mean() for a in (0, 1)]
    assert float(pairs.contrast(logits)) == pytest.approx(np.mean(want), rel=1e-5)
    for with_self in (True, False):
        kept = np.ones((b, b), bool) if with_self else ~np.eye(b, dtype=bool)
        p, q = (np.where(kept, np.exp(unit(e) @ unit(e).T / temperature), 0) for e in (t, x))
        p, q = (a / a.sum(axis=1, keepdims=True) for a in (p, q))
        want = sum(p[kept] * np.log(p[kept] / q[kept])) / b
        found = pairs.relation(jnp.asarray(x, jnp.float32), jnp.asarray(t, jnp.float32), temperature, with_self)
        assert float(found) == pytest.approx(want, rel=1e-4)
    assert float(pairs.relation(jnp.asarray(x), jnp.asarray(3 * x), temperature)) == pytest.approx(0, abs=1e-6)
    apart = np.square(unit(x)[:, None] - unit(x)[None]).sum(-1)[~np.eye(b, dtype=bool)]
    assert float(salm.uniformity(jnp.asarray(x))) == pytest.approx(np.log(np.exp(-2 * apart).mean()), rel=1e-4)


def test_structure_is_that_of_all_pairs_of_patches():
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(3, 11, 5)), 4 * rng.normal(size=(3, 11, 8))

    def matrices(x):
        length = np.linalg.norm(x, axis=-1)
        apart = length[:, :, None] - length[:, None]
        return unit(x) @ unit(x).swapaxes(1, 2), apart / apart.std(axis=(1, 2), keepdims=True)

    want = [np.square(a - b).mean() for a, b in zip(matrices(x), matrices(t), strict=True)]
    found = salm.structure(jnp.asarray(x, jnp.float32), jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(found, want, rtol=1e-4)


@pytest.mark.parametrize(
    "curriculum, want",
    [(True, [(0, 1), (0, 1), (0.5, 0.55), (1, 0.1), (1, 0.1)]), (False, [(1, 0.1)] * 5)],
)
def test_weights_of_the_four_quarters(curriculum, want):
    given = SimpleNamespace(options=salm.SalmOptions(curriculum=curriculum))
    at = [salm.Objective.weights(given, done) for done in (0.0, 0.25, 0.5, 0.75, 1.0)]
    np.testing.assert_allclose(at, want, rtol=1e-6)
