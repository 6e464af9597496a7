"""Tune CLIP vision encoders through a frozen diffusion U-Net (DIVA, arXiv 2407.20171), in JAX.

For people who write Python: `load`, `objective`, `train`, `evaluate` and `export`, see docs/PYTHON.md. Each is imported
when it is used first, so that `import diva_jax` takes no time.
"""

import importlib
import os
import sys

__version__ = "0.1.0"
__all__ = ["evaluate", "export", "load", "objective", "train"]

_after_m = sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] if "-m" in sys.orig_argv else []
if any(f"{name}.".startswith("diva_jax.") for name in _after_m) or os.path.basename(sys.argv[0]).startswith("diva-"):
    # A command that is interrupted while it imports ends with one line; `common.cli` has its own handler.
    import signal

    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130)))


def __getattr__(name: str):
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
