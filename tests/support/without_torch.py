"""A pytest plugin under which PyTorch and the libraries built on it cannot be imported, as in a plain install."""

import sys
from importlib.machinery import PathFinder

PACKAGES = ("torch", "torchvision", "open_clip", "timm", "diffusers", "sklearn", "clip_benchmark")


class Finder(PathFinder):
    """Finds every module of the import path except those of PACKAGES."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.split(".")[0] in PACKAGES else super().find_spec(fullname, path, target)


def pytest_configure():
    """Replaces Python's finder; only loaded with `-p without_torch`."""
    sys.meta_path[:] = [Finder if f is PathFinder else f for f in sys.meta_path]
