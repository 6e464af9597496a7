"""Do our modules compute what the authors' PyTorch code computed?  python tests/golden/check.py FILE...

Each FILE.npz records inputs, weights, random draws and results of one of the methods. Which method it is follows from
its name; the modules beside this one each read those of one method. The tiny U-Net and VAE of Stable Diffusion are in
sd_tiny_7.npz. Prints a line per quantity; exits 1 where one is past its bound, 2 where a file cannot be compared.
"""

import importlib
import sys
from pathlib import Path

import jax
import numpy as np

HERE = Path(__file__).parent
METHODS = ("dcr", "diva", "genhancer", "kuea", "unclip")
BOUND = 2e-5

sys.path[:0] = [folder for folder in (str(HERE), str(HERE.parent / "support")) if folder not in sys.path]

import reading  # noqa: E402
from helpers import relative_error  # noqa: E402


def errors(path: str | Path) -> list[tuple[str, float, float]]:
    """Returns (quantity, relative L2 error, bound) of all that a file records; a ValueError if no method has such files
    or it computes others. Its module has `PREFIX`, how their names begin, and `compare(path, z, sd)`: by quantity what
    is recorded, ours, and what an error is relative to if not to that; `sd` are state dicts of U-Net and VAE."""
    path = Path(path)
    methods = [importlib.import_module(name) for name in METHODS]
    if not (method := next((m for m in methods if path.stem.startswith(m.PREFIX)), None)):
        raise ValueError(f"{path.name} is not named as the files of any method")
    with jax.default_matmul_precision("highest"):
        recorded, ours, scales = method.compare(path, np.load(path), np.load(reading.SD))
    if differ := sorted(set(recorded) ^ set(ours)):
        raise ValueError(f"quantities differ: {differ}")
    # A rounding to bfloat16 may fall to the other side.
    bounds = {k: 1e-4 if k.startswith("bf16/") else BOUND for k in recorded}
    scales = {k: want if np.any(want) else np.ones(1) for k, want in recorded.items()} | scales
    return [(k, relative_error(ours[k], want, scales[k]), bounds[k]) for k, want in recorded.items()]


def main(files: list[str]) -> int:
    found = []
    for path in files:
        print(path)
        try:
            rows = errors(path)
        except (OSError, KeyError, ValueError) as e:
            print(f"error: {path}: {e}", file=sys.stderr)
            return 2
        for key, error, bound in rows:
            found.append(error <= bound)
            print(f"{key:<60} {error:.2e}  bound {bound:.0e}  {'ok' if found[-1] else 'PAST THE BOUND'}")
    print(f"{len(found)} quantities, {found.count(False)} past their bound")
    return int(not (found and all(found)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
