"""A pytest plugin under which PyTorch and the libraries built on it cannot be imported, as in a plain install."""

import sys

PACKAGES = ("torch", "torchvision", "open_clip", "timm", "diffusers", "sklearn", "clip_benchmark")

for _name in PACKAGES:
    sys.modules[_name] = None  # An import raises ImportError, and importlib.util.find_spec returns None.
