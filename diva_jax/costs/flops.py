"""How much arithmetic one training image needs, counted in the traced loss and its gradient: the numerator of MFU.

Model FLOPs: matrix products and convolutions alone, a multiply-add as two, every convolution with its full window.
"""

import collections
import math
import re

from jax.extend.core import Jaxpr, jaxprs_in_params

_SCOPE = re.compile(r"(?:\w+\()*([\w-]+)\)*")  # With the transformations around it: transpose(jvp(unet)).
_RECOMPUTED = {"checkpoint", "rematted_computation"}


def by_part(jaxpr: Jaxpr, times: int = 1, part: str = "") -> collections.Counter[str]:
    """The FLOPs of a jaxpr that is run `times` times in the part `part`, by the outermost `jax.named_scope`, the part;
    "" for operations outside of any."""
    total = collections.Counter()
    for e in jaxpr.eqns:
        scopes = (_SCOPE.fullmatch(scope) for scope in str(e.source_info.name_stack).split("/"))
        own = part or next((scope[1] for scope in scopes if scope and scope[1] not in _RECOMPUTED), "")
        if e.primitive.name == "dot_general":
            (contracted, _), _ = e.params["dimension_numbers"]
            summed = math.prod(e.invars[0].aval.shape[i] for i in contracted)
            total[own] += 2 * times * math.prod(e.outvars[0].aval.shape) * summed
        elif e.primitive.name == "conv_general_dilated":
            kernel, numbers = e.invars[1].aval.shape, e.params["dimension_numbers"]
            work = 2 * math.prod(e.outvars[0].aval.shape) * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
            # The backward pass of a stride multiplies mostly zeros.
            total[own] += times * work // math.prod(e.params["lhs_dilation"])
        for inner in jaxprs_in_params(e.params):
            total += by_part(inner, times * e.params.get("length", 1), own)
    return total
