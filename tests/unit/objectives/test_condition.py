"""The condition from tokens: selection, addition of the text, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diva_jax.common.errors import UserError
from diva_jax.models.backbones import Features
from diva_jax.objectives import diva

RNG = np.random.default_rng(0)
FEATURES = Features(jnp.asarray(RNG.normal(size=(3, 15, 4))), jnp.asarray(RNG.normal(size=(3, 4))))


def test_runs_are_means_along_the_raster_order_remainder_dropped():
    out = diva.select_tokens(FEATURES, "runs:4")
    assert out.shape == (3, 1 + 3, 4) and diva.token_count("runs:4", 15) == 4
    np.testing.assert_allclose(out[:, 0], FEATURES.pooled)
    for i in range(3):
        np.testing.assert_allclose(out[:, 1 + i], FEATURES.tokens[:, 4 * i : 4 * i + 4].mean(1), rtol=1e-6)


def test_random_takes_the_drawn_patches_pooled_first():
    indices = jnp.asarray([[0, 14, 14], [3, 2, 1], [7, 7, 7]])
    out = diva.select_tokens(FEATURES, "random:3", indices)
    np.testing.assert_allclose(out[:, 0], FEATURES.pooled)
    for b in range(3):
        np.testing.assert_allclose(out[b, 1:], FEATURES.tokens[b][indices[b]])


def test_draws_are_uniform_with_replacement_and_differ_by_image():
    keys = jax.random.split(jax.random.key(1), 400)
    drawn = np.asarray(diva.draw_token_indices(keys, "random:50", 15))
    assert drawn.shape == (400, 50) and drawn.min() == 0 and drawn.max() == 14
    counts = np.bincount(drawn.ravel(), minlength=15)
    expected = drawn.size / 15
    assert ((counts - expected) ** 2 / expected).sum() < 36.1  # chi-squared, 14 degrees of freedom, p = 0.001
    assert all(len(set(row)) < 50 for row in drawn), "without replacement there would be no repeats"
    assert len({tuple(row) for row in drawn}) == 400
    assert diva.draw_token_indices(keys, "all", 15) is None


def test_text_is_added_token_by_token_or_as_its_mean():
    projected, text = jnp.asarray(RNG.normal(size=(2, 5, 3))), jnp.asarray(RNG.normal(size=(1, 5, 3)))
    np.testing.assert_allclose(diva.add_text(projected, text, "token"), projected + text)
    wide = jnp.asarray(RNG.normal(size=(1, 9, 3)))
    np.testing.assert_allclose(diva.add_text(projected, wide, "mean"), projected + wide.mean(1), rtol=1e-5)


def test_token_wise_text_needs_as_many_tokens():
    diva.check_fit("random:76", "token", 256, 77)
    with pytest.raises(UserError, match="select=random:76"):
        diva.check_fit("all", "token", 256, 77)
