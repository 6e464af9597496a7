"""Do our modules compute what the authors' PyTorch code computed?  python tests/golden/check.py FILE...

Each FILE.npz records inputs, weights, random draws and results of one of the methods. Which method it is follows from
its name; the modules beside this one each read those of one method. Files that need Stable Diffusion's tiny U-Net and
VAE take them from the sd_*.npz among the arguments, else from the one beside this script. Prints a line per quantity;
exits 1 where one is past its bound, 2 where a file cannot be read.
"""

import importlib
import pkgutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
SD = "sd_tiny_7.npz"

sys.path[:0] = [folder for folder in (str(HERE), str(HERE.parent / "support")) if folder not in sys.path]


def method_of(path: Path):
    """The module that reads a file, or None."""
    names = [m.name for m in pkgutil.iter_modules([str(HERE)]) if m.name not in (Path(__file__).stem, "reading")]
    return next((m for m in map(importlib.import_module, names) if m.reads(path.stem)), None)


def errors(path: str | Path, sd: str | Path = HERE / SD) -> list[tuple[str, float, float]]:
    """Returns (quantity, relative L2 error, bound), for every result that a file records.

    The module of its method has `reads(stem of the file's name)` and `errors(path, sd)`; `sd` are the state dicts of
    U-Net and VAE.

    Raises:
      ValueError: no method has files of this name, one that belongs to it is missing, or it records other quantities
        than we compute.
    """
    path = Path(path)
    method = method_of(path)
    if method is None:
        raise ValueError(f"{path.name} is not named as the files of any method")
    return method.errors(path, Path(sd))


def main(arguments: list[str]) -> int:
    files = [Path(a) for a in arguments if not Path(a).name.startswith("sd_")]
    sd = next((Path(a) for a in arguments if Path(a).name.startswith("sd_")), HERE / SD)
    if not files:
        print(__doc__.splitlines()[0], file=sys.stderr)
        return 2
    failed = total = 0
    for path in files:
        try:
            rows = errors(path, sd)
        except (OSError, KeyError, ValueError) as e:
            print(f"error: {path}: {e}", file=sys.stderr)
            return 2
        print(path.name)
        for key, error, bound in rows:
            print(f"{key:<60} {error:.2e}  bound {bound:.0e}  {'ok' if error <= bound else 'PAST THE BOUND'}")
        total, failed = total + len(rows), failed + sum(not error <= bound for _, error, bound in rows)
    print(f"{total} quantities, {failed} past their bound")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
