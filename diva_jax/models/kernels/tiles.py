"""What the Pallas kernels for TPUs share; it does not import Pallas, which takes 50 ms."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

Array = jax.Array

LANES = 128  # Tiles are multiples of the number of lanes of a vector register.
NN = (((1,), (0,)), ((), ()))  # x @ y


def tile(n: int, most: int) -> int:
    """Returns the largest divisor of n that is a multiple of LANES and at most `most`; n is a multiple of LANES."""
    return max(t for t in range(LANES, most + 1, LANES) if n % t == 0)


def dot(x: Array, y: Array, dims=NN) -> Array:
    """A product inside of a kernel, with a float32 result; float32 inputs, as in tests, are multiplied in float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def by_device(fn: Callable, *arrays: Array, whole: tuple[Array, ...] = ()):
    """Returns fn(*arrays, *whole), each device of the mesh on its own part of the batch: XLA cannot partition a kernel.

    The arrays, and the results, are [B, ...]; the size of the mesh divides B; `whole` are weights, on every device.
    """
    batch = P(jax.sharding.get_abstract_mesh().axis_names)
    specs = (batch,) * len(arrays) + (P(),) * len(whole)
    return jax.shard_map(fn, in_specs=specs, out_specs=batch, check_vma=False)(*arrays, *whole)
