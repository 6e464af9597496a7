"""Two-way name tables between PyTorch checkpoints and our NNX modules, strict in both directions.

A table turns the path of an NNX parameter into the name that the original library gives it. The map is
made by walking the model, so it covers every parameter, and is used both ways: `assign` fills a model from
tensors, `to_torch` writes them back. Layouts: `kernel` [in, out] is PyTorch's `weight` [out, in], and a
convolution's `kernel` [H, W, in, out] its `weight` [out, in, H, W]; everything else is carried as it is.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from flax import nnx

from diva_jax.common.errors import UserError, listing

# Tensors read at the same time; each needs its own memory once more meanwhile.
_READERS = 2
_LEAF = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


@dataclasses.dataclass(frozen=True)
class Table:
    """Names of one architecture in one library's checkpoints.

    Attributes:
      what: shown in errors, e.g. "diffusers U-Net".
      rename: (regex, replacement) applied in turn to our dotted path, its leaf already renamed
        (kernel, scale, embedding -> weight).
      ignore: regexes of checkpoint names that are known and not used.
      aliases: (regex, replacement) that bring older checkpoints' names to today's before anything else.
    """

    what: str
    rename: tuple[tuple[str, str], ...] = ()
    ignore: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()

    def torch_name(self, path: tuple) -> str:
        """`("blocks", 0, "attn", "kernel")` -> e.g. `"blocks.0.attn.weight"`, renamed."""
        *head, leaf = (str(p) for p in path)
        name = ".".join([*head, _LEAF.get(leaf, leaf)])
        for pattern, replacement in self.rename:
            name = re.sub(pattern, replacement, name)
        return name

    def names(self, state) -> list[str]:
        """The names of all parameters of a state."""
        return [self.torch_name(path) for path in flat(state)]

    def canonical(self, name: str) -> str:
        for pattern, replacement in self.aliases:
            name = re.sub(pattern, replacement, name)
        return name

    def ignored(self, name: str) -> bool:
        return any(re.fullmatch(p, name) for p in self.ignore)


def flat(state) -> dict[tuple, nnx.Variable]:
    """Path -> variable, of a module or state."""
    if isinstance(state, nnx.Module):
        state = nnx.state(state)
    return dict(nnx.to_flat_state(state))


def torch_shape(path: tuple, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the PyTorch tensor that belongs to our parameter."""
    if path[-1] != "kernel":
        return tuple(shape)
    return (shape[1], shape[0]) if len(shape) == 2 else (shape[3], shape[2], shape[0], shape[1])


def from_torch_layout(path: tuple, array):
    if path[-1] != "kernel":
        return array
    return array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)


def to_torch_layout(path: tuple, array):
    if path[-1] != "kernel":
        return array
    return array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)


def _report(what: str, source: str, problems: Iterable[tuple[str, list[str]]]):
    """Raises one UserError that lists every problem."""
    found = [f"{title}: {listing(names, 40)}" for title, names in problems if names]
    if found:
        raise UserError(f"{source} does not fit the {what} of the config: {'; '.join(found)}")


def check(state, tensors: Mapping, table: Table, *, source: str = "the checkpoint") -> None:
    """Compares names and shapes of a checkpoint with those of a state; arguments as `assign`'s.

    Raises:
      UserError: a name is unknown, missing, or of another shape; lists them all.
    """
    names = {table.canonical(n): n for n in tensors}
    shapes = {table.torch_name(path): torch_shape(path, var.shape) for path, var in flat(state).items()}
    found = {n: tuple(tensors[names[n]].shape) for n in shapes if n in names}
    _report(
        table.what,
        source,
        [
            ("missing", [n for n in shapes if n not in names]),
            ("unknown", [n for c, n in names.items() if c not in shapes and not table.ignored(c)]),
            ("wrong shape", [f"{n} (is {found[n]}, should be {shapes[n]})" for n in found if found[n] != shapes[n]]),
        ],
    )


def assign(
    state,
    tensors: Mapping[str, np.ndarray],
    table: Table,
    *,
    source: str = "the checkpoint",
    put: Callable[[tuple, np.ndarray, jax.ShapeDtypeStruct], jax.Array] | None = None,
):
    """Fills an abstract state with a checkpoint's tensors.

    Args:
      state: module or state whose variables hold anything with shape and dtype (`nnx.eval_shape`'s result).
      tensors: name -> array; may be lazy: values need `.shape` and, when read, `np.asarray`. Read in two threads.
      table: the names.
      source: named in errors.
      put: (path, array in our layout and dtype, of any strides, wanted shape and dtype) -> device array.

    Returns:
      A state of the same structure, each array of the dtype that the abstract one has.

    Raises:
      UserError: a name is unknown, missing, or of another shape; lists them all.
    """
    put = put or (lambda path, array, want: jax.device_put(array))
    check(state, tensors, table, source=source)
    names = {table.canonical(n): n for n in tensors}
    wanted = {table.torch_name(path): (path, var) for path, var in flat(state).items()}

    def fill(item) -> tuple[tuple, nnx.Variable]:
        name, (path, var) = item
        # A transposed view: jax copies any layout to the device as fast as a dense one, so no copy is made here.
        array = from_torch_layout(path, np.asarray(tensors[names[name]])).astype(var.dtype, copy=False)
        return path, var.replace(put(path, array, jax.ShapeDtypeStruct(var.shape, var.dtype)))

    with ThreadPoolExecutor(_READERS) as pool:
        return nnx.from_flat_state(dict(pool.map(fill, wanted.items())))


def to_torch(state, table: Table) -> dict[str, np.ndarray]:
    """Name -> array in PyTorch's names and layouts, contiguous; the inverse of `assign`."""
    return {
        table.torch_name(path): np.ascontiguousarray(to_torch_layout(path, np.asarray(var.get_value())))
        for path, var in flat(state).items()
    }


def load_into(module: nnx.Module, tensors: Mapping[str, np.ndarray], table: Table, **kw) -> nnx.Module:
    """`assign` and merge: the module with its weights."""
    graph, state = nnx.split(module)
    return nnx.merge(graph, assign(state, tensors, table, **kw))
