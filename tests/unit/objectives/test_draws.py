"""The sum over draws with the memory of one has the value and gradient of the plain sum; which tokens are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diva_jax.common.errors import UserError
from diva_jax.objectives import diva
from diva_jax.objectives.shared import draws


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
