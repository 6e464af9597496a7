"""Config files, `configs/*.py`, found by path or by name, and the modules of one's own that configs name by dotted
paths. These are imported where a config file asks for them alone. A workdir may come from elsewhere; what its config
names is imported only where the config file names it too, where it is imported already, or after `--trust_objective`.
"""

import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from diva_jax.common import paths
from diva_jax.common.errors import UserError, brief, listing, named_by_configs, place

_CONFIGS = Path(__file__).parents[1] / "configs"
# Fields whose value can be the dotted path of a module, or of a class in one.
_MODULES, _CLASSES = ("objective",), ("_class_name", "code")
_OWN = re.compile(r"diva_jax\.(\w+\.)*(objectives\.\w+|\w+_code)")
_trusted: set[str] = set()
_trusts_all = False


def find(name: str) -> Path:
    """The file of a config: a path, or the name of a config of this package: "vitl14", "vitl14.py",
    "configs/vitl14.py". A UserError where there is neither."""
    path = paths.expanded(name)
    own = _CONFIGS / f"{path.name.removesuffix('.py')}.py"
    if path.is_file() and path.suffix == ".py":
        return path
    if path.parent.name in ("", "configs") and own.is_file():
        return own
    known = sorted(f.stem for f in _CONFIGS.glob("*.py"))
    raise UserError(f"there is no config file {name!r}: give a .py file, or the name of a config: {listing(known, 50)}")


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
    except Exception as e:  # A config file is a program, which can raise anything.
        where = place(e) or path
        raise UserError(f"{path} does not make a config ({type(e).__name__}: {e}; {where}): correct this line") from e


def module(path: str, field: str, wanted: str) -> ModuleType:
    """Imports a module by its dotted path. A UserError, with the `field` of the config or the flag that has it and what
    is `wanted` instead, where there is none."""
    try:
        found = importlib.import_module(path)
        root = getattr(sys.modules[path.partition(".")[0]], "__path__", None) or [found.__file__ or ""]
        if not path.startswith("diva_jax.") and (folder := str(root[0])):
            named_by_configs.add(folder if folder.endswith(".py") else f"{folder}/")
        return found
    except (ImportError, TypeError, ValueError) as e:  # A TypeError for a path that begins with a dot.
        if isinstance(e, ImportError) and e.name and not f"{path}.".startswith(f"{e.name}."):
            raise  # What is missing is something that the module imports.
        raise UserError(f"{field}={brief(path)} cannot be imported ({e}): {wanted}") from e


def is_own(name: str) -> bool:
    """Whether a module is an objective, or a code of latents, of this package."""
    return _OWN.fullmatch(name) is not None


def _named(config: Any) -> set[str]:
    """The modules that a config names by dotted paths."""
    if not isinstance(config, Mapping):
        return set()
    paths = {k: v for k, v in config.items() if k in _MODULES + _CLASSES and isinstance(v, str) and "." in v}
    found = {v if k in _MODULES else v.rpartition(".")[0] for k, v in paths.items()}
    return found.union(*map(_named, config.values()))


def trust(config: Mapping[str, Any] | None = None) -> None:
    """From now on, workdirs may name what this config names; without a config, anything."""
    global _trusts_all
    _trusts_all = _trusts_all or config is None
    _trusted.update(_named(config))


def check_stored(config: Mapping[str, Any], where: str) -> None:
    """Raises a UserError where a config that was read from a workdir names a module that nobody else has named."""
    unknown = sorted(m for m in _named(config) - _trusted - sys.modules.keys() if not is_own(m))
    if unknown and not _trusts_all:
        problem = f"{where} names the module {brief(unknown[0])}, which would be executed"
        advice = "read it, then give --trust_objective (in Python, import it first; evaluate: or a --config with it)"
        raise UserError(f"{problem}: {advice}")
