"""Sums over Monte Carlo draws with the memory of one."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def weighted_sum(fn: Callable, inputs, draws, weights: jax.Array):
    """sum_k weights[k] * fn(inputs, draws[k]), differentiable with respect to `inputs`.

    Differentiating a plain scan keeps every draw's activations until the backward pass. Here each draw's
    gradient is taken right after its forward pass and only the sum is kept, so that N passes through a
    U-Net need the memory (and the compile time) of one, with no recomputation.

    Args:
      fn: (inputs, one draw) -> (scalar, aux).
      inputs: pytree of arrays; the result is differentiable in these and in nothing else.
      draws: pytree of arrays with a leading axis [N, ...].
      weights: [N], float.

    Returns:
      (scalar, aux stacked over draws [N, ...]).
    """

    def plain(inputs):
        values, aux = jax.lax.map(lambda draw: fn(inputs, draw), draws)
        return jnp.vdot(weights, values), aux

    def forward(inputs):
        def body(grads, x):
            draw, weight = x
            (value, aux), g = jax.value_and_grad(fn, has_aux=True)(inputs, draw)
            return jax.tree.map(lambda a, b: a + (weight * b).astype(a.dtype), grads, g), (value, aux)

        zeros = jax.tree.map(jnp.zeros_like, inputs)
        grads, (values, aux) = jax.lax.scan(body, zeros, (draws, weights))
        return (jnp.vdot(weights, values), aux), grads

    def backward(grads, cotangents):
        ct, _ = cotangents  # aux carries no gradient
        return (jax.tree.map(lambda g: (ct * g).astype(g.dtype), grads),)

    total = jax.custom_vjp(plain)
    total.defvjp(forward, backward)
    return total(inputs)
