"""Tune CLIP vision encoders through a frozen diffusion U-Net (DIVA, arXiv 2407.20171), in JAX.

For people who write Python: `load`, `objective`, `train`, `evaluate` and `export`, see docs/PYTHON.md. Each is imported
when it is used first, so that `import diva_jax` takes no time.
"""

import importlib

__version__ = "0.1.0"
__all__ = ["evaluate", "export", "load", "objective", "train"]


def __getattr__(name: str):
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
