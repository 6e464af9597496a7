"""Reads options from the config files of diffusers and transformers folders; unsupported ones are errors."""

from collections.abc import Iterable, Mapping
from typing import Any

from diva_jax.common.errors import UserError


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
        raise UserError(f"the {what}'s config is that of a {name}, give the folder of a {kind}")
    for name, value in options.items():
        if name.startswith("_") or name in used:
            continue
        if name not in fixed and value is not None:
            raise UserError(f"the {what}'s config has the unknown option {name}={value!r}, remove it")
        entries = value if isinstance(value, list | tuple) else [value]
        if name in fixed and not all(e in fixed[name] for e in entries):
            raise UserError(
                f"the {what}'s config has {name}={value!r}, which is not supported (only {fixed[name][0]!r}): "
                "use a Stable Diffusion 1.5, 2.1-base, 2.1 or 2.1-unclip checkpoint"
            )


def integers(options: Mapping[str, Any], name: str, default, what: str) -> tuple[int, ...]:
    """Returns an option as a tuple of positive integers; a single number becomes a tuple of one.

    Raises:
      UserError: the option is not a positive integer or a list of them.
    """
    value = options.get(name, default)
    entries = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not entries or not all(type(e) is int and e > 0 for e in entries):
        raise UserError(f"the {what}'s config has {name}={value!r}, it must be a positive integer or a list of them")
    return entries


def integer(options: Mapping[str, Any], name: str, default: int, what: str) -> int:
    """Returns an option that is one positive integer.

    Raises:
      UserError: the option is not a positive integer.
    """
    entries = integers(options, name, default, what)
    if len(entries) > 1:
        raise UserError(f"the {what}'s config has {name}={entries}, give a single number")
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
