"""Sums over Monte Carlo draws with the memory of one."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def weighted_sum(fn: Callable, inputs, draws, weights: jax.Array):
    """sum_k weights[k] * fn(inputs, draws[k]), differentiable in `inputs` and in what `fn` closes over.

    Differentiating a plain scan keeps every draw's activations until the backward pass. Here each draw's
    gradient is taken right after its forward pass and only the sum is kept, so that N passes through a
    U-Net need the memory (and the compile time) of one, with no recomputation.

    Args:
      fn: (inputs, one draw) -> (scalar, aux). Arrays that it closes over are differentiated where they depend on what
        is differentiated outside, so that any part of a model may be trained; gradients of others are not computed.
      inputs: pytree of arrays.
      draws: pytree of arrays with a leading axis [N, ...].
      weights: [N], float.

    Returns:
      (scalar, aux stacked over draws [N, ...]).
    """

    fn, closed_over = jax.closure_convert(fn, inputs, jax.tree.map(lambda d: d[0], draws))
    leaves, structure = jax.tree.flatten((inputs, closed_over))

    def at(leaves, draw):
        inputs, closed_over = jax.tree.unflatten(structure, leaves)
        return fn(inputs, draw, *closed_over)

    def plain(leaves):
        values, aux = jax.lax.map(lambda draw: at(leaves, draw), draws)
        return jnp.vdot(weights, values), aux

    def forward(leaves):
        trained = {i: leaf.value for i, leaf in enumerate(leaves) if leaf.perturbed}

        def one(trained, draw):
            return at([trained.get(i, leaf.value) for i, leaf in enumerate(leaves)], draw)

        def body(grads, x):
            draw, weight = x
            (value, aux), g = jax.value_and_grad(one, has_aux=True)(trained, draw)
            return jax.tree.map(lambda a, b: a + (weight * b).astype(a.dtype), grads, g), (value, aux)

        zeros = jax.tree.map(jnp.zeros_like, trained)
        if len(weights) == 1:
            # One pass needs no loop.
            grads, seen = body(zeros, jax.tree.map(lambda x: x[0], (draws, weights)))
            values, aux = jax.tree.map(lambda x: x[None], seen)
        else:
            grads, (values, aux) = jax.lax.scan(body, zeros, (draws, weights))
        return (jnp.vdot(weights, values), aux), grads

    def backward(grads, cotangents):
        ct, _ = cotangents  # aux carries no gradient
        if isinstance(ct, jax.custom_derivatives.SymbolicZero):
            grads = {}
        return ([(ct * grads[i]).astype(grads[i].dtype) if i in grads else None for i in range(len(leaves))],)

    total = jax.custom_vjp(plain)
    total.defvjp(forward, backward, symbolic_zeros=True)
    return total(leaves)
