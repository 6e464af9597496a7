"""Sums over draws, the judge's posterior, losses over pairs and SALM's structure, written out."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diva_jax.common.errors import UserError
from diva_jax.objectives import diva, judge, salm
from diva_jax.objectives.shared import draws, pairs


def loss(inputs, draw):
    w, x = inputs
    value = jnp.sum(jnp.tanh(x @ w) * draw["eps"]) * draw["t"]
    return value, {"losses": value}


def test_value_and_gradient_equal_the_plain_sum():
    rng = np.random.default_rng(0)
    inputs = (jnp.asarray(rng.normal(size=(3, 5))), jnp.asarray(rng.normal(size=(7, 3))))
    drawn = {"eps": jnp.asarray(rng.normal(size=(4, 7, 5))), "t": jnp.arange(4.0)}
    weights = jnp.asarray([0.1, 2.0, -1.0, 5.0])

    def plain(inputs):
        values = [loss(inputs, jax.tree.map(lambda a, k=k: a[k], drawn))[0] for k in range(4)]
        return sum(w * v for w, v in zip(weights, values, strict=True))

    (value, aux), grads = jax.value_and_grad(lambda i: draws.weighted_sum(loss, i, drawn, weights), has_aux=True)(
        inputs
    )
    expected, wanted = jax.value_and_grad(plain)(inputs)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    chained = jax.grad(lambda i: 3 * draws.weighted_sum(loss, i, drawn, weights)[0])(inputs)
    for got, want, scaled in zip(grads, wanted, chained, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(scaled, 3 * want, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(jnp.vdot(weights, aux["losses"]), expected, rtol=1e-5)
    undifferentiated, _ = draws.weighted_sum(loss, inputs, drawn, weights)
    np.testing.assert_allclose(undifferentiated, expected, rtol=1e-5)


def test_memory_does_not_grow_with_the_draws():
    w = jnp.zeros((256, 256))

    def deep(inputs, draw):
        x = draw
        for _ in range(8):
            x = jnp.tanh(x @ inputs)
        return jnp.sum(x), ()

    def temporaries(n):
        f = jax.grad(lambda w: draws.weighted_sum(deep, w, jnp.zeros((n, 512, 256)), jnp.ones(n))[0])
        return jax.jit(f).lower(w).compile().memory_analysis().temp_size_in_bytes

    one = temporaries(1)
    # The input of each draw is kept; saving eight activations per draw would need eight times the memory.
    assert temporaries(6) < one + 6 * 512 * 256 * 4 * 2


def test_what_the_function_closes_over_is_differentiated_too():
    """Parameters that are not among the inputs, and values that were computed from some; constants are not."""
    rng = np.random.default_rng(1)
    params = {"w": rng.normal(size=(3, 5)), "u": rng.normal(size=(5, 2)), "v": rng.normal(size=(4, 3))}
    x, eps, weights = rng.normal(size=(7, 4)), rng.normal(size=(4, 7, 2)), jnp.asarray([0.1, 2.0, -1.0, 5.0])

    def value(params, summed):
        latents = jnp.tanh(x @ params["v"])

        def one_draw(w, draw):
            value = jnp.sum(jnp.tanh(latents @ w) @ params["u"] * draw)
            return value, value

        return summed(one_draw, params["w"], jnp.asarray(eps))

    def plain(fn, w, drawn):
        return sum(weights[k] * fn(w, drawn[k])[0] for k in range(4))

    def ours(fn, w, drawn):
        return draws.weighted_sum(fn, w, drawn, weights)[0]

    params = jax.tree.map(jnp.asarray, params)
    expected = jax.grad(lambda p: value(p, plain))(params)
    for compiled in (lambda f: f, jax.jit):
        got = compiled(jax.grad(lambda p: value(p, ours)))(params)
        for name in params:
            np.testing.assert_allclose(got[name], expected[name], rtol=2e-5, atol=1e-6, err_msg=name)
    # A frozen parameter of the same function costs no gradient.
    frozen = {n: a for n, a in params.items() if n != "u"}
    grads = jax.make_jaxpr(jax.grad(lambda p, u: value({**p, "u": u}, ours)))(frozen, params["u"])
    both = jax.make_jaxpr(jax.grad(lambda p: value(p, ours)))(params)
    assert str(grads).count("dot_general") < str(both).count("dot_general")


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
