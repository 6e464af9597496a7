"""Modules of one's own, which configs name by dotted paths: imported where a config file asks for them alone. A workdir
may come from elsewhere; what its config names is imported only where the config file names it too, where it is imported
already, or after `--trust_objective`."""

import importlib
import re
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from diva_jax.common.errors import UserError, brief, named_by_configs

# Fields whose value can be the dotted path of a module, or of a class in one.
_MODULES, _CLASSES = ("objective",), ("_class_name", "code")
# Objectives and codes of latents of this package.
_OWN = re.compile(r"diva_jax\.(\w+\.)*(objectives\.\w+|\w+_code)")
_trusted: set[str] = set()
_trusts_all = False


def module(path: str, field: str, wanted: str) -> ModuleType:
    """Imports a module by its dotted path. A UserError, with the `field` of the config or the flag that has it and what
    is `wanted` instead, where there is none."""
    try:
        found = importlib.import_module(path)
        root = getattr(sys.modules[path.partition(".")[0]], "__path__", None) or [found.__file__ or ""]
        if not path.startswith("diva_jax.") and (folder := str(root[0])):
            named_by_configs.add(folder if folder.endswith(".py") else f"{folder}/")
        return found
    except (ImportError, ValueError) as e:
        if isinstance(e, ImportError) and e.name and not f"{path}.".startswith(f"{e.name}."):
            raise  # Of something that the module imports.
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
        raise UserError(
            f"{where} names the module {brief(unknown[0])}, which would be executed: read it, then give "
            "--trust_objective (in Python, import it first), or a --config that names it too"
        )
