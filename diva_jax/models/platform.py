"""The kind of device that a function is traced for, and which of this package's kernels it may use there.

The device is that of the abstract mesh of `jax.sharding` and not that of the machine that traces, so that a step
compiled for a TPU on a CPU is the same program as one compiled on the TPU.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

# Names of kernels, or None for all of them.
_KERNELS: contextvars.ContextVar[frozenset[str] | None] = contextvars.ContextVar("kernels", default=None)
# Whether the backward pass computes blocks again where a config says so.
_RECOMPUTES: contextvars.ContextVar[bool] = contextvars.ContextVar("recomputes", default=True)


@contextlib.contextmanager
def counting() -> Iterator[None]:
    """Context manager in which what is traced computes nothing twice, to count FLOPs."""
    token = _RECOMPUTES.set(False)
    try:
        yield
    finally:
        _RECOMPUTES.reset(token)


def recomputes(remat: bool) -> bool:
    """Whether a block that is to be computed again in the backward pass is, see `counting`."""
    return remat and _RECOMPUTES.get()


@contextlib.contextmanager
def traced_on(mesh, kernels: frozenset[str] | None) -> Iterator[None]:
    """Context manager in which a function is traced for an abstract mesh, with these kernels, see `allowed`."""
    token = _KERNELS.set(kernels)
    try:
        with jax.sharding.use_abstract_mesh(mesh):
            yield
    finally:
        _KERNELS.reset(token)


def allowed(kernel: str) -> bool:
    """Whether a kernel of `models/kernels` may be used in what is traced now: "attention 64" for heads of 64,
    "feed-forward 320" for 320 channels."""
    kernels = _KERNELS.get()
    return kernels is None or kernel in kernels


def traced_for(mesh=None) -> str:
    """Returns "cpu", "gpu" or "tpu" for an abstract mesh, by default the one that is set; "" where none was set."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    device = None if mesh.empty else mesh.abstract_device
    return "" if device is None else device.platform
