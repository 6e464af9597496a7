"""Checks of config fields: each owner of a section keeps one table of rules for its values."""

import math
import numbers
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from diva_jax.common.errors import UserError, brief

# Field, predicate of its value, and what the value must be as the end of a sentence: "must be at least 1".
Rule = tuple[str, Callable[[Any], bool], str]


def at_least(field: str, least: float) -> Rule:
    """A rule that allows numbers from `least` on."""
    return field, lambda v: v >= least, f"must be at least {least}"


def finite(value: Any) -> bool:
    """Whether it is a number, neither NaN nor infinite."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def between(field: str, least: float, most: float, below: bool = False) -> Rule:
    """A rule that allows numbers from `least` to `most`; with `below`, less than `most`."""
    sentence = f"must be {least:g} to {most:g}" + (", exclusive" if below else "")
    return field, lambda v: finite(v) and least <= v and (v < most if below else v <= most), sentence


def whole(field: str, least: int, most: int = 10**9) -> Rule:
    """A rule that allows whole numbers from `least` to `most`."""
    good = lambda v: isinstance(v, numbers.Integral) and not isinstance(v, bool) and least <= v <= most  # noqa: E731
    return field, good, f"must be a whole number, {least} to {most}"


def pair(field: str, least: float, most: float) -> Rule:
    """A rule that allows two numbers from `least` to `most`, the second not below the first."""

    def good(v):
        low, high = v
        return finite(low) and finite(high) and least <= low <= high <= most

    return field, good, f"must be two numbers, {least:g} <= low <= high <= {most:g}"


def one_of(field: str, *values: Any) -> Rule:
    """A rule that allows these values alone."""
    return field, lambda v: v in values, f"must be {' or '.join(map(str, values))}"


def require(section: Mapping[str, Any], rules: Iterable[Rule], name: str = "config") -> None:
    """Applies a table of rules to a section.

    Args:
      section: field (or dotted path, see `flatten`) -> value.
      rules: see `Rule`; those of fields that the section does not have are passed over.
      name: the section's path, such as `config.eval`, for the message.

    Raises:
      UserError: a value breaks its rule.
    """
    for field, holds, sentence in rules:
        if field in section:
            try:
                good = holds(section[field])
            except (
                TypeError,
                ValueError,
                AttributeError,
                OverflowError,
            ):  # A value of another type, such as a number in place of a pair.
                good = False
            if not good:
                raise UserError(f"{name}.{field}={brief(section[field])} {sentence}")


def flatten(tree: Mapping[str, Any], whole: Collection[str] = (), prefix: str = "") -> dict[str, Any]:
    """Nested sections -> {dotted path: value}; the sections named in `whole` are values themselves."""
    out = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in whole:
            out.update(flatten(value, whole, name + "."))
        else:
            out[name] = value
    return out


def unknown(section: Mapping[str, Any], known: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted paths of all fields of a section, at any depth, that `known` does not have."""
    there = flatten(known, (), prefix)
    return [field for field in flatten(section, (), prefix) if field not in there]
