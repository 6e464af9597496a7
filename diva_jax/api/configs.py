"""Configs as arguments of functions."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from diva_jax.common.errors import UserError

# Of the package, and of a clone.
_OWN = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")


def _file(name: str) -> Path:
    """Returns a config file: a path, or the name of a config of this package."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    for folder in _OWN if path.parent.name in ("", "configs") else ():
        if (own := folder / f"{path.name.removesuffix('.py')}.py").is_file():
            return own
    raise UserError(f"the config {name!r} does not exist: give a ConfigDict, or the path of a file such as tiny.py")


def read(config: ConfigDict | str | os.PathLike, fields: Mapping[str, Any] | None = None) -> ConfigDict:
    """Returns a config with some fields changed; a ConfigDict that is given is not changed.

    Args:
      config: a result of `config.default`, or a config file, `configs/vitl14.py` or `configs/vitl14.py:faithful`.
      fields: dotted path of a field -> value, as the flags of the commands have them: {"optim.lr": 3e-4}.

    Raises:
      UserError: there is no such file, it has no config, or there is no such field.
    """
    if isinstance(config, ConfigDict):
        found = config.copy_and_resolve_references()
    else:
        name, _, argument = os.fspath(config).partition(":")
        path = _file(name)
        try:
            spec = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            found = module.get_config(argument) if argument else module.get_config()
        except UserError:
            raise
        except Exception as e:  # A config file is a program, which can raise anything.
            raise UserError(f"{path} is not a config file ({type(e).__name__}: {e}): see diva_jax/config.py") from e
    try:
        found.update_from_flattened_dict(dict(fields or {}))
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"fields={dict(fields)!r} do not fit the config ({e}): see diva_jax/config.py") from e
    return found.lock()
