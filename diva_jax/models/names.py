"""Tables of names between our parameters and the tensors of PyTorch checkpoints, their layouts, and the sizes that a
checkpoint's shapes tell."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from flax import nnx

from diva_jax.common.errors import UserError, brief, listing

_LEAF = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


class Table(NamedTuple):
    """Names of one architecture in one library's checkpoints; `what` is shown in errors. `rename` are (regex,
    replacement), applied in turn to our dotted path with its leaf already renamed (kernel, scale, embedding -> weight);
    `ignore` are regexes of checkpoint names that are known and not used; `aliases` are (regex, replacement) that bring
    older checkpoints' names to today's first."""

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
        """Today's name of a checkpoint's tensor, see `aliases`."""
        for pattern, replacement in self.aliases:
            name = re.sub(pattern, replacement, name)
        return name

    def ignored(self, name: str) -> bool:
        """Whether a checkpoint's tensor is known and not used."""
        return any(re.fullmatch(p, name) for p in self.ignore)


def flat(state) -> dict[tuple, nnx.Variable]:
    """Path -> variable, of a module or state."""
    if isinstance(state, nnx.Module):
        state = nnx.state(state)
    return dict(nnx.to_flat_state(state))


def torch_shape(path: tuple, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the PyTorch tensor that belongs to our parameter."""
    return to_torch_layout(path, np.broadcast_to(0, shape)).shape


def from_torch_layout(path: tuple, array, axes: tuple[int, ...] = (2, 3, 1, 0)):
    """A PyTorch tensor's values in the layout of our parameter: a transposed view, no copy."""
    if path[-1] != "kernel":
        return array
    return array.T if array.ndim == 2 else array.transpose(axes)


def to_torch_layout(path: tuple, array):
    """The inverse of `from_torch_layout`."""
    return from_torch_layout(path, array, (3, 2, 0, 1))


class Positions(NamedTuple):
    """The learned position embeddings of a vision tower, the tensor `name` [..., extra + grid * grid, width]. The first
    `extra`, e.g. the class token's, are kept at every resolution. The original interpolates the others with bicubic
    interpolation, with antialiasing (Keys' kernel, a = -0.5) or without (a = -0.75, as
    `torch.nn.functional.interpolate` has it); None: with it where the model has registers."""

    name: str
    extra: int = 0
    antialias: bool | None = True

    def grid(self, tensors: Mapping) -> int:
        """Patches along one side in the checkpoint."""
        return round(max(0, tensor_shape(tensors, self.name, 2, 3)[-2] - self.extra) ** 0.5)


def tensor_shape(tensors: Mapping, name: str, *axes: int) -> tuple[int, ...]:
    """The shape of a checkpoint's tensor; a UserError where it is missing, empty, or not of `axes` (two) axes."""
    where = f"the checkpoint {listing(getattr(tensors, 'files', ()), 1)}".strip()
    if name not in tensors:
        raise UserError(f"{where} is incomplete, {name} is missing: fetch it again")
    shape = tuple(tensors[name].shape)
    if len(shape) not in (axes or (2,)) or 0 in shape:
        raise UserError(f"{where}: the tensor {name} has the shape {brief(shape)}: fetch it again")
    return shape


def depth(names: Iterable[str], prefix: str) -> int:
    """How many different numbers follow `prefix` in names such as `prefix.11.norm1.weight`."""
    return len({m[1] for n in names if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", n))})
