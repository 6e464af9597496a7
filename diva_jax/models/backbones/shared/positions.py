"""Position embeddings in a checkpoint, and the checkpoint's depth."""

import dataclasses
import re
from collections.abc import Iterable, Mapping

from diva_jax.common.errors import UserError, brief


@dataclasses.dataclass(frozen=True)
class Positions:
    """The learned position embeddings of a vision tower, the tensor `name` [..., extra + grid * grid, width]. The first
    `extra`, e.g. the class token's, are kept at every resolution. The original interpolates the others with bicubic
    interpolation, with antialiasing (Keys' kernel, a = -0.5) or without (a = -0.75, as
    `torch.nn.functional.interpolate` has it)."""

    name: str
    extra: int = 0
    antialias: bool = True

    def grid(self, tensors: Mapping) -> int:
        """Patches along one side in the checkpoint."""
        return round(max(0, tensor_shape(tensors, self.name, 2, 3)[-2] - self.extra) ** 0.5)


def tensor_shape(tensors: Mapping, name: str, *axes: int) -> tuple[int, ...]:
    """The shape of a checkpoint's tensor; a UserError where it is missing, empty, or not of `axes` (two) axes."""
    if name not in tensors:
        raise UserError(f"the checkpoint is incomplete, {name} is missing: download it again")
    shape = tuple(tensors[name].shape)
    if len(shape) not in (axes or (2,)) or 0 in shape:
        raise UserError(f"the checkpoint's tensor {name} has the shape {brief(shape)}: download it again")
    return shape


def depth(names: Iterable[str], prefix: str) -> int:
    """How many different numbers follow `prefix` in names such as `prefix.11.norm1.weight`."""
    return len({m[1] for n in names if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", n))})


def sizes(tensors: Mapping, positions: Positions, patch_embed: str, blocks: str, fc1: str) -> dict:
    """The fields of Spec that the shapes of any Vision Transformer's checkpoint tell. The names are those of the patch
    embedding's weight, of the blocks, without their numbers, and of the weight of the first layer of an MLP, in its
    block."""
    width, _, _, patch = tensor_shape(tensors, patch_embed, 4)
    return dict(
        image_size=positions.grid(tensors) * patch,
        patch_size=patch,
        width=width,
        layers=depth(tensors, blocks),
        mlp_dim=tensor_shape(tensors, f"{blocks}.0.{fc1}")[0],
    )
