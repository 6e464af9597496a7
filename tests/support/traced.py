"""FLOPs of a traced program, to compare counts with."""

import math

from jax.extend.core import jaxprs_in_params


def traced(jaxpr, times=1):
    """Counts the FLOPs of matrix products and convolutions (full windows) of a jaxpr, a multiply-add as two."""
    total = 0
    for e in jaxpr.eqns:
        out = e.outvars[0].aval
        if e.primitive.name == "dot_general":
            (contracted, _), _ = e.params["dimension_numbers"]
            total += 2 * times * math.prod(out.shape) * math.prod(e.invars[0].aval.shape[i] for i in contracted)
        elif e.primitive.name == "conv_general_dilated":
            kernel, numbers = e.invars[1].aval.shape, e.params["dimension_numbers"]
            work = 2 * math.prod(out.shape) * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
            total += (
                times * work // math.prod(e.params["lhs_dilation"])
            )  # The backward pass of a stride multiplies mostly zeros.
        inner = times * e.params.get("length", 1)
        for sub in jaxprs_in_params(e.params):
            total += traced(sub, inner)
    return total
