"""The condition from tokens: which are drawn, and errors; its values are those of DIVA's golden files."""

import jax
import numpy as np
import pytest

from diva_jax.common.errors import UserError
from diva_jax.objectives import diva


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


def test_token_wise_text_needs_as_many_tokens():
    diva.check_fit("random:76", "token", 256, 77)
    with pytest.raises(UserError, match="select=random:76"):
        diva.check_fit("all", "token", 256, 77)
