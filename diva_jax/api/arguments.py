"""What the functions of the API check of their arguments: names as Python checks them, in words that help; choices."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from diva_jax import config as configs
from diva_jax.common import errors
from diva_jax.common.errors import UserError, brief


def named(*others: str) -> Callable[[Callable], Callable]:
    """Makes a function refuse keywords that neither it nor its `**options` (`others`) has, with those which are
    meant."""

    def of(function: Callable) -> Callable:
        parameters = inspect.signature(function).parameters.values()
        known = [p.name for p in parameters if p.kind != p.VAR_KEYWORD and p.name != "self"] + list(others)

        @functools.wraps(function)
        def checked(*args, **keywords):
            if wrong := [name for name in keywords if name not in known]:
                otherwise = f"it has {', '.join(known)}"
                if "fields" in known and not errors.nearest(wrong[0], known):
                    if fields := errors.nearest(wrong[0], configs.declared("diva")):
                        otherwise = f"give fields={{{fields[0]!r}: VALUE}}"
                raise UserError(errors.unknown(f"{function.__name__} has no argument", wrong, known, otherwise))
            return function(*args, **keywords)

        return checked

    return of


def chosen(name: str, value: Any, choices: Collection[str]) -> None:
    """Raises a UserError where a value is none of some choices."""
    if value not in choices:
        meant = errors.nearest(value, choices) if isinstance(value, str) else []
        advice = f"did you mean {' or '.join(meant)}?" if meant else "give one of these"
        raise UserError(f"{name}={brief(value)} is none of {', '.join(choices)}: {advice}")


def mapping(name: str, value: Any, example: str) -> dict[str, Any]:
    """Returns a mapping with texts as keys as a dict; {} for None. Raises a UserError for anything else."""
    if value is not None and not (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
        raise UserError(f"{name}={brief(value)} is no mapping of names: give {name}={example}")
    return dict(value or {})
