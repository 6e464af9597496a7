"""Tensors that are still in their files, by name."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is in a file: shape and dtype at once, values when `np.asarray` asks for them."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = self.read()
        return array if dtype is None else array.astype(dtype)


class Tensors(Mapping):
    """Name -> lazy tensor.

    Attributes:
      files: the paths they are in, for fingerprints and messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], files: list[Path]):
        self.files = files
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def renamed(self, rename: Callable[[str], str | None]) -> "Tensors":
        """The same tensors under new names; those that are given None are left out."""
        return Tensors({new: t for old, t in self.items() if (new := rename(old)) is not None}, self.files)
