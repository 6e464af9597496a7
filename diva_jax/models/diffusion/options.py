"""Reading the config files of diffusers and transformers folders, strictly."""

from collections.abc import Iterable, Mapping
from typing import Any

from diva_jax.common.errors import UserError


def check(options: Mapping[str, Any], what: str, *, used: Iterable[str], fixed: Mapping[str, tuple], kind: str = ""):
    """Refuses options that would change the result and that our module does not know.

    Args:
      options: a config file's content; names that begin with an underscore are notes, not options.
      what: named in errors, e.g. "U-Net".
      used: names that the caller reads, or that have no influence on the result.
      fixed: name -> the values that give what our module computes; a list is fine if its entries are.
      kind: what `_class_name` must be where it is given.

    Raises:
      UserError: another class, an option with a value that is not in `fixed`, or an unknown option.
    """
    name = options.get("_class_name", kind)
    if kind and name != kind:
        raise UserError(f"the {what}'s config is one of {name}, give the folder of a {kind}")
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
    """A list of positive integers; one number is a list of one."""
    value = options.get(name, default)
    entries = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not entries or not all(type(e) is int and e > 0 for e in entries):
        raise UserError(f"the {what}'s config has {name}={value!r}, it must be a positive integer or a list of them")
    return entries


def integer(options: Mapping[str, Any], name: str, default: int, what: str) -> int:
    """One positive integer."""
    entries = integers(options, name, default, what)
    if len(entries) > 1:
        raise UserError(f"the {what}'s config has {name}={entries}, only a single number is supported")
    return entries[0]


def per_block(options: Mapping[str, Any], name: str, default, count: int, what: str) -> tuple[int, ...]:
    """One positive integer for each of `count` blocks, from a list or from one number for all."""
    entries = integers(options, name, default, what)
    if not isinstance(options.get(name, default), list | tuple):
        entries *= count
    if len(entries) != count:
        raise UserError(f"the {what}'s config has {len(entries)} values of {name} for {count} blocks")
    return entries


def divisible(values: Iterable[int], divisors: Iterable[int], names: tuple[str, str], what: str):
    """Refuses a pair of which the second does not divide the first."""
    for value, divisor in zip(values, divisors, strict=True):
        if value % divisor:
            raise UserError(f"the {what}'s config has {names[0]} {value}, which {names[1]} {divisor} does not divide")
