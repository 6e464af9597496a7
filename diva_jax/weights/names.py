"""PyTorch checkpoints into our NNX modules and back, strict in both directions.

A `Table` (`models.names`) turns the path of a parameter into its name in a checkpoint. The map is made by walking the
model, so it covers every parameter. Layouts: `kernel` [in, out] is PyTorch's `weight` [out, in], and a convolution's
`kernel` [H, W, in, out] its `weight` [out, in, H, W]; everything else is carried as it is.
"""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diva_jax.common.errors import UserError, listing
from diva_jax.models.names import Table, flat, from_torch_layout, to_torch_layout, torch_shape

_READERS = 2  # Tensors that are read at the same time. Each needs its own memory a second time meanwhile.
_CHUNK = 2**20  # Elements of a tensor whose values are checked at a time.


def check_type(name: str, dtype: np.dtype, source: str) -> None:
    """Raises a UserError where a tensor is not of a floating type of at least 16 bits."""
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        raise UserError(f"{source}: the tensor {name} is of type {dtype}: give a file of unquantised float weights")


def check_values(name: str, array: np.ndarray, source: str, may_be_zero: bool = True) -> None:
    """Checks floats of 2, 4 or 8 bytes, of any strides, in one pass over their bits: a UserError where one is NaN or
    infinite, or, unless `may_be_zero` (biases), where all are zero."""
    flat_array = array.ravel(order="K")
    bits = flat_array.view(f"u{array.dtype.itemsize}")
    infinity = np.asarray(np.inf, array.dtype).view(bits.dtype)
    magnitude = bits.dtype.type(np.iinfo(bits.dtype).max >> 1)  # Without the sign, floats are ordered as integers are.
    largest = 0
    for start in range(0, bits.size, _CHUNK):
        largest = max(largest, int((bits[start : start + _CHUNK] & magnitude).max()))
    if largest >= int(infinity):
        raise UserError(f"{source}: the tensor {name} has values that are NaN or infinite: fetch the file again")
    if array.size and not largest and not may_be_zero:
        raise UserError(f"{source}: the tensor {name} is zero everywhere: fetch the file again")


def check_names(state, tensors: Mapping, table: Table, *, source: str = "the checkpoint") -> None:
    """A UserError lists names that are unknown, missing, or of another shape; arguments as `assign`'s."""
    names = {table.canonical(n): n for n in tensors}
    shapes = {table.torch_name(path): torch_shape(path, var.shape) for path, var in flat(state).items()}
    there = {n: tuple(tensors[names[n]].shape) for n in shapes if n in names}
    problems = {
        "missing": [n for n in shapes if n not in names],
        "unknown": [n for c, n in names.items() if c not in shapes and not table.ignored(c)],
        "wrong shape": [f"{n} (is {there[n]}, should be {shapes[n]})" for n in there if there[n] != shapes[n]],
    }
    if any(problems.values()):
        listed = "; ".join(f"{title}: {listing(wrong, 40)}" for title, wrong in problems.items() if wrong)
        raise UserError(f"{source} does not fit the {table.what} of the config: {listed}")


def assign(
    state,
    tensors: Mapping[str, np.ndarray],
    table: Table,
    *,
    source: str = "the checkpoint",
    put: Callable[[tuple, np.ndarray, jax.ShapeDtypeStruct], jax.Array] | None = None,
):
    """Fills an abstract module or state with a checkpoint's tensors, which may be lazy; returns a state with its
    dtypes. `put` makes device arrays of (path, array in our layout and dtype, of any strides, wanted shape and dtype),
    in two threads. A UserError as of `check_names`, and where a tensor is not of a floating type, not finite, or a
    kernel of zeros."""
    put = put or (lambda path, array, want: jax.device_put(array))
    check_names(state, tensors, table, source=source)
    names = {table.canonical(n): n for n in tensors}
    wanted = {table.torch_name(path): (path, var) for path, var in flat(state).items()}

    def fill(item) -> tuple[tuple, nnx.Variable]:
        name, (path, var) = item
        # A transposed view: jax copies any layout to the device as fast as a dense one, so no copy is made here.
        array = np.asarray(tensors[names[name]])
        check_type(names[name], array.dtype, source)
        with np.errstate(over="ignore"):  # What overflows is infinite, and found as such.
            array = from_torch_layout(path, array).astype(var.dtype, copy=False)
        if array.shape != var.shape:
            raise UserError(f"{source}: the tensor {names[name]} has not the shape that its file declares")
        check_values(names[name], array, source, may_be_zero=path[-1] != "kernel")
        return path, var.replace(put(path, array, jax.ShapeDtypeStruct(var.shape, var.dtype)))

    with ThreadPoolExecutor(_READERS) as pool:
        return nnx.from_flat_state(dict(pool.map(fill, wanted.items())))


def to_torch(state, table: Table) -> dict[str, np.ndarray]:
    """Name -> array in PyTorch's names and layouts, contiguous; the inverse of `assign`."""
    return {
        table.torch_name(path): np.ascontiguousarray(to_torch_layout(path, np.asarray(var.get_value())))
        for path, var in flat(state).items()
    }


# Our modules have diffusers' names, but for the positions in the U-Net's feed-forward list. The aliases are names of
# older versions of the libraries; FLUX's are those of Black Forest Labs' own files.
_TABLES = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
UNET, VAE, TEXT_ENCODER, FLUX_VAE = (Table(**_TABLES[name]) for name in ("unet", "vae", "text_encoder", "flux_vae"))
