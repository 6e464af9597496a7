"""Tables of names between our parameters and the tensors of PyTorch checkpoints, and their layouts; `weights.names`
uses them.
"""

import dataclasses
import re

from flax import nnx

_LEAF = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


@dataclasses.dataclass(frozen=True)
class Table:
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
    if path[-1] != "kernel":
        return tuple(shape)
    return (shape[1], shape[0]) if len(shape) == 2 else (shape[3], shape[2], shape[0], shape[1])


def from_torch_layout(path: tuple, array, axes: tuple[int, ...] = (2, 3, 1, 0)):
    """A PyTorch tensor's values in the layout of our parameter: a transposed view, no copy."""
    if path[-1] != "kernel":
        return array
    return array.T if array.ndim == 2 else array.transpose(axes)


def to_torch_layout(path: tuple, array):
    """The inverse of `from_torch_layout`."""
    return from_torch_layout(path, array, (3, 2, 0, 1))
