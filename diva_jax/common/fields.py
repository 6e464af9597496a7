"""Checks of config fields: tables of what a field must be, and one sentence where it is not."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from diva_jax.common.errors import UserError


class Rule(NamedTuple):
    """What one field must be.

    Attributes:
      field: its dotted name below the checked section.
      holds: value -> whether it is allowed.
      use: what to use instead, for the error: "1 or more".
    """

    field: str
    holds: Callable[[Any], bool]
    use: str


def one_of(field: str, *values: Any) -> Rule:
    """A rule that allows these values alone."""
    return Rule(field, lambda v: v in values, " or ".join(str(v) for v in values))


def at_least(field: str, least: float) -> Rule:
    """A rule that allows numbers from `least` on."""
    return Rule(field, lambda v: v >= least, f"{least} or more")


def require(values: Mapping[str, Any], rules: Iterable[Rule], section: str = "config") -> None:
    """Checks the fields of a section; rules of fields that it does not have are passed over.

    Args:
      values: dotted name -> value, as `flatten` returns them.
      rules: the table.
      section: of the fields, named in errors.

    Raises:
      UserError: the first field that is not what its rule allows.
    """
    for rule in rules:
        if rule.field in values:
            value = values[rule.field]
            try:
                holds = rule.holds(value)
            except (TypeError, ValueError):  # A value of another type, e.g. a number where there must be a pair.
                holds = False
            if not holds:
                raise UserError(f"{section}.{rule.field}={value!r}: use {rule.use}")


def flatten(tree: Mapping[str, Any], whole: Collection[str] = (), prefix: str = "") -> dict[str, Any]:
    """Nested sections -> {dotted name: value}; the sections named in `whole` are values themselves."""
    out = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in whole:
            out.update(flatten(value, whole, name + "."))
        else:
            out[name] = value
    return out
