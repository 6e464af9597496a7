"""Config files, `configs/*.py`: found by path or by name, and loaded."""

import importlib.util
import os
from pathlib import Path

from ml_collections import ConfigDict

from diva_jax.common.errors import UserError, listing, place

_OWN = Path(__file__).parents[1] / "configs"


def find(name: str) -> Path:
    """The file of a config: a path, or the name of a config of this package: "vitl14", "vitl14.py",
    "configs/vitl14.py". A UserError where there is neither."""
    path = Path(name).expanduser()
    own = _OWN / f"{path.name.removesuffix('.py')}.py"
    if path.is_file():
        return path
    if path.parent.name in ("", "configs") and own.is_file():
        return own
    known = sorted(f.stem for f in _OWN.glob("*.py"))
    raise UserError(f"the config {name!r} does not exist: give a file, or the name of a config: {listing(known, 50)}")


def read(config: str | os.PathLike) -> ConfigDict:
    """The config of a file (see `find`), locked; what follows a colon is the argument of its `get_config`:
    "vitl14:faithful". A UserError where there is no such file, or it fails."""
    name, _, argument = os.fspath(config).partition(":")
    path = find(name)
    try:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return (module.get_config(argument) if argument else module.get_config()).lock()
    except UserError:
        raise
    except Exception as e:
        # A config file is a program, which can raise anything.
        where = place(e) or path
        raise UserError(f"{path} does not make a config ({type(e).__name__}: {e}; {where}): correct this line") from e
