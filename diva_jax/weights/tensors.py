"""Lazy tensors: names, shapes and dtypes of the tensors in files, whose values are read on request."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file, whose shape and dtype are known, and whose values are read by `np.asarray`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = self.read()
        return array if dtype is None else array.astype(dtype)


class Tensors(dict[str, Tensor]):
    """Name -> lazy tensor, with the files that contain them, for fingerprints and messages."""

    def __init__(self, tensors: Mapping[str, Tensor], files: list[Path]):
        super().__init__(tensors)
        self.files = files

    def renamed(self, rename: Callable[[str], str | None]) -> "Tensors":
        """Returns the tensors under new names, without those for which `rename` returns None."""
        return Tensors({new: t for old, t in self.items() if (new := rename(old)) is not None}, self.files)
