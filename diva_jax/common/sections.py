"""Rules for the values of config sections: each owner of a section keeps one table of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diva_jax.common.errors import UserError

# Field, predicate of its value, and what the value must be as the end of a sentence: "must be at least 1".
Rule = tuple[str, Callable[[Any], bool], str]


def require(section: Mapping[str, Any], rules: Sequence[Rule], name: str) -> None:
    """Applies a table of rules to a section.

    Args:
      section: field -> value.
      rules: see `Rule`.
      name: the section's path, such as `config.eval`, for the message.

    Raises:
      UserError: a value breaks its rule.
    """
    for field, holds, sentence in rules:
        if not holds(section[field]):
            raise UserError(f"{name}.{field}={section[field]!r} {sentence}")


def unknown(section: Mapping[str, Any], known: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted paths of all fields of a section, at any depth, that `known` does not have."""
    found = []
    for field, value in section.items():
        if field not in known:
            found.append(prefix + field)
        elif isinstance(value, Mapping) and isinstance(known[field], Mapping):
            found += unknown(value, known[field], f"{prefix}{field}.")
    return found
