"""Position embeddings in a checkpoint, and the checkpoint's depth."""

import dataclasses
import re
from collections.abc import Iterable, Mapping

from diva_jax.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Positions:
    """The learned position embeddings of a vision tower; [..., extra + grid * grid, width].

    Attributes:
      name: of the tensor in the checkpoint.
      extra: embeddings before those of the patches, e.g. the class token's; kept at every resolution.
      antialias: how the original interpolates them: bicubic with antialiasing (Keys' kernel, a = -0.5), or without
        (a = -0.75, as `torch.nn.functional.interpolate` has it).
    """

    name: str
    extra: int = 0
    antialias: bool = True

    def grid(self, tensors: Mapping) -> int:
        """Patches along one side in the checkpoint."""
        return round((tensor_shape(tensors, self.name)[-2] - self.extra) ** 0.5)


def tensor_shape(tensors: Mapping, name: str) -> tuple[int, ...]:
    """The shape of a tensor of the vision tower.

    Raises:
      UserError: the checkpoint does not have it.
    """
    if name not in tensors:
        raise UserError(f"the checkpoint's vision tower is incomplete, {name} is missing: download it again")
    return tuple(tensors[name].shape)


def depth(names: Iterable[str], prefix: str) -> int:
    """How many different numbers follow `prefix` in names such as `prefix.11.norm1.weight`."""
    return len({m[1] for n in names if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", n))})
