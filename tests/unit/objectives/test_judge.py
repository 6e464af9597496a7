"""The judge's posterior, its weights, and the controls of its verdicts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diva_jax.objectives import judge


@pytest.fixture(scope="module", params=range(4))
def errors(request):
    """Errors of 7 images under 5 texts and the neutral one."""
    return jnp.asarray(np.random.default_rng(request.param).uniform(0.5, 1.5, (7, 6)), jnp.float32)


ALL = jnp.ones((7, 6), bool)


def test_the_posterior_follows_the_texts(errors):
    found, weight = judge.posterior(errors, ALL, 9.0)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)
    # The order of the texts is theirs, and what all errors have in common does not count.
    flipped, same = judge.posterior(jnp.concatenate([errors[:, 4::-1], errors[:, 5:]], axis=1), ALL, 9.0)
    np.testing.assert_allclose(flipped, found[:, ::-1], rtol=1e-5)
    shifted, also = judge.posterior(errors + jnp.arange(7)[:, None], ALL, 9.0)
    np.testing.assert_allclose(shifted, found, rtol=1e-4)
    for other in (same, also):
        np.testing.assert_allclose(other, weight, rtol=1e-4)
    # A lower error is a larger share, by exp(beta * difference).
    np.testing.assert_allclose(
        jnp.log(found[:, 0] / found[:, 3]), 9 * (errors[:, 3] - errors[:, 0]), rtol=1e-3, atol=1e-4
    )


def test_equal_errors_are_uniform_and_a_better_neutral_text_abstains(errors):
    level = jnp.broadcast_to(errors[:, :1], errors.shape)
    found, weight = judge.posterior(level, ALL, 300.0)
    np.testing.assert_allclose(found, 0.2, rtol=1e-5)
    np.testing.assert_allclose(weight, 0.5, rtol=1e-5)
    for neutral, want in ((0.0, 0.0), (2.0, 1.0)):  # Below and above all texts.
        _, weight = judge.posterior(errors.at[:, -1].set(neutral), ALL, 300.0)
        np.testing.assert_allclose(weight, want, atol=1e-6)


def test_texts_that_are_not_there_have_no_share(errors):
    present = ALL.at[0, 3].set(False).at[1, 1:5].set(False).at[2, :5].set(False).at[3, 5].set(False)
    found, weight = judge.posterior(jnp.where(present, errors, jnp.nan), present, 9.0)
    assert np.isfinite(found).all() and np.isfinite(weight).all()
    alone, _ = judge.posterior(errors[:1, jnp.array([0, 1, 2, 4, 5])], ALL[:1, :5], 9.0)
    np.testing.assert_allclose(found[0, jnp.array([0, 1, 2, 4])], alone[0], rtol=1e-6)
    assert found[0, 3] == 0 and weight[1] == weight[2] == 0 and weight[3] == 1


def test_a_shuffled_verdict_has_the_same_values_and_says_nothing(errors):
    present = ALL[:, :5].at[0, 1].set(False)
    found, _ = judge.posterior(errors, ALL.at[0, 1].set(False), 9.0)
    many = jax.vmap(lambda k: judge.shuffled(found, present, jax.random.split(k, 7)))(
        jax.random.split(jax.random.key(1), 500)
    )
    np.testing.assert_array_equal(np.sort(many, axis=-1), np.broadcast_to(np.sort(found, axis=-1), many.shape))
    assert (many[:, 0, 1] == 0).all()
    mean, kept = np.asarray(many.mean(axis=0)), np.asarray(present)
    np.testing.assert_allclose(mean[kept], (kept / kept.sum(axis=1, keepdims=True))[kept], atol=0.08)
