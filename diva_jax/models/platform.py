"""The kind of device that a function is traced for, and which of this package's kernels it may use there.

The device is that of the abstract mesh of `jax.sharding` and not that of the machine that traces, so that a step
compiled for a TPU on a CPU is the same program as one compiled on the TPU.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

Array = jax.Array
LANES = 128  # Tiles are multiples of the number of lanes of a vector register.
# Names of kernels, or None for all of them.
_KERNELS: contextvars.ContextVar[frozenset[str] | None] = contextvars.ContextVar("kernels", default=None)


@contextlib.contextmanager
def traced_on(mesh, kernels: frozenset[str] | None, exact: bool = False) -> Iterator[None]:
    """Context manager in which a function is traced for an abstract mesh, with these kernels, see `allowed`; `exact`:
    float32 is multiplied in float32, if jax's settings do not say otherwise, where TPUs and GPUs would round it."""
    token = _KERNELS.set(kernels)
    precision = jax.config.jax_default_matmul_precision or ("highest" if exact else None)
    try:
        with jax.sharding.use_abstract_mesh(mesh), jax.default_matmul_precision(precision):
            yield
    finally:
        _KERNELS.reset(token)


def allowed(kernel: str) -> bool:
    """Whether a kernel of `models/kernels.py` may be used in what is traced now: "attention 64" for heads of 64,
    "feed-forward 320" for 320 channels."""
    kernels = _KERNELS.get()
    return kernels is None or kernel in kernels


def traced_for(mesh=None) -> str:
    """Returns "cpu", "gpu" or "tpu" for an abstract mesh, by default the one that is set; "" where none was set."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    device = None if mesh.empty else mesh.abstract_device
    return "" if device is None else device.platform


def split(x: Array, count: int) -> Array:
    """[B, ...] -> [count, B/count, ...]: part p has images p, p + count, ..., so that no image changes its device."""
    return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)


def tile(n: int, most: int, unit: int = LANES) -> int:
    """Returns the largest divisor of n that is a multiple of `unit` and at most `most`; n is a multiple of `unit`."""
    return max(t for t in range(unit, min(n, most) + 1, unit) if n % t == 0)


def dot(x: Array, y: Array, dims=(((1,), (0,)), ((), ()))) -> Array:
    """A product in a kernel, by default x @ y, in float32; float32 inputs, as in tests, are multiplied in float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def by_device(fn: Callable, *arrays: Array, whole: tuple[Array, ...] = ()):
    """Returns fn(*arrays, *whole), each device of the mesh on its own part of the batch: XLA cannot partition a kernel.
    The arrays, and the results, are [B, ...]; the size of the mesh divides B; `whole` are weights, on every device."""
    batch = P(jax.sharding.get_abstract_mesh().axis_names)
    specs = (batch,) * len(arrays) + (P(),) * len(whole)
    return jax.shard_map(fn, in_specs=specs, out_specs=batch, check_vma=False)(*arrays, *whole)
