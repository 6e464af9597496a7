"""Reads options from the config files of diffusers and transformers folders; unsupported ones are errors."""

from collections.abc import Iterable, Mapping
from typing import Any

from diva_jax.common.errors import UserError, brief
from diva_jax.common.fields import finite

_LARGEST = 2**20  # Of widths and vocabularies; beyond it, one matrix alone has a terabyte.
_MOST = 64  # Of layers, and of entries of a list.


def require_supported(
    options: Mapping[str, Any], what: str, *, used: Iterable[str], fixed: Mapping[str, tuple], kind: str = ""
):
    """Raises a UserError if a config has options that change the result and are not implemented here.

    Args:
      options: the content of a config file; names that begin with an underscore are metadata and are ignored.
      what: the name of the model in error messages, e.g. "U-Net".
      used: names of options that the caller reads, or that do not affect the result.
      fixed: name -> the values that are implemented; of a list, each entry must be one of them.
      kind: the required value of `_class_name`, if the config has that entry.

    Raises:
      UserError: the config is that of another class, a value is not in `fixed`, or an option is unknown.
    """
    name = options.get("_class_name", kind)
    if kind and name != kind:
        raise UserError(f"the {what}'s config is that of a {brief(name)}, give the folder of a {kind}")
    for name, value in options.items():
        if name.startswith("_") or name in used:
            continue
        if name not in fixed and value is not None:
            raise UserError(f"the {what}'s config has the unknown option {brief(name)}={brief(value)}, remove it")
        entries = value if isinstance(value, list | tuple) else [value]
        if name in fixed and not all(e in fixed[name] for e in entries):
            raise UserError(
                f"the {what}'s config has {name}={brief(value)}, which is not supported (only {fixed[name][0]!r}): "
                "use a Stable Diffusion 1.5, 2.1-base, 2.1 or 2.1-unclip checkpoint"
            )


def integers(options: Mapping[str, Any], name: str, default, what: str) -> tuple[int, ...]:
    """Returns an option as a tuple of positive integers; a single number becomes a tuple of one.

    Raises:
      UserError: the option is not a positive integer or a list of at most `_MOST` of them, or one is above `_LARGEST`,
        or above `_MOST` if it counts layers.
    """
    value = options.get(name, default)
    entries = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not 1 <= len(entries) <= _MOST or not all(type(e) is int and e > 0 for e in entries):
        raise UserError(
            f"the {what}'s config has {name}={brief(value)}, it must be a positive integer or a list of at most {_MOST}"
        )
    most = _MOST if "layers" in name else _LARGEST
    if max(entries) > most:
        raise UserError(f"the {what}'s config has {name}={brief(value)}, more than {most}: fetch the file again")
    return entries


def number(options: Mapping[str, Any], name: str, default: float, what: str, least: float, most: float) -> float:
    """Returns an option that is one number; null stands for the default.

    Raises:
      UserError: the option is not a number from `least` to `most`.
    """
    value = default if options.get(name) is None else options[name]
    if not finite(value) or not least <= value <= most:
        raise UserError(f"the {what}'s config has {name}={brief(value)}, it must be a number, {least:g} to {most:g}")
    return float(value)


def flag(options: Mapping[str, Any], name: str, default: bool, what: str) -> bool:
    """Returns an option that is true or false; null stands for the default.

    Raises:
      UserError: the option is neither.
    """
    value = default if options.get(name) is None else options[name]
    if not isinstance(value, bool):
        raise UserError(f"the {what}'s config has {name}={brief(value)}, it must be true or false")
    return value


def names(options: Mapping[str, Any], name: str, default: tuple[str, ...], count: int, what: str) -> tuple[str, ...]:
    """Returns an option that is a list of `count` names.

    Raises:
      UserError: it is not, or has another length.
    """
    value = options.get(name, default)
    if not isinstance(value, list | tuple) or not all(isinstance(n, str) for n in value):
        raise UserError(f"the {what}'s config has {name}={brief(value)}, it must be a list of names")
    if len(value) != count:
        raise UserError(
            f"the {what}'s config has {len(value)} {name} for {count} block_out_channels: give one per entry"
        )
    return tuple(value)


def integer(options: Mapping[str, Any], name: str, default: int, what: str) -> int:
    """Returns an option that is one positive integer.

    Raises:
      UserError: the option is not a positive integer.
    """
    entries = integers(options, name, default, what)
    if len(entries) > 1:
        raise UserError(f"the {what}'s config has {name}={brief(entries)}, give a single number")
    return entries[0]


def per_block(options: Mapping[str, Any], name: str, default, count: int, what: str) -> tuple[int, ...]:
    """Returns one positive integer per block, from a list of `count` entries or from one number for all blocks.

    Raises:
      UserError: the entries are not positive integers, or their number is not `count`.
    """
    entries = integers(options, name, default, what)
    if not isinstance(options.get(name, default), list | tuple):
        entries *= count
    if len(entries) != count:
        raise UserError(
            f"the {what}'s config has {len(entries)} values of {name} for {count} blocks: give one per block"
        )
    return entries


def divisible(values: Iterable[int], divisors: Iterable[int], names: tuple[str, str], what: str):
    """Raises a UserError if a divisor does not divide its value; `names` are the options' names in the message."""
    for value, divisor in zip(values, divisors, strict=True):
        if value % divisor:
            raise UserError(
                f"the {what}'s config has {names[0]} {value}, it must be a multiple of {names[1]} {divisor}"
            )
