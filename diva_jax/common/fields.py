"""Sections of the config: each field is declared once, with its default, its documentation and its rule.

    @dataclasses.dataclass(frozen=True)
    class OptimOptions:
        lr: float = field(1e-4, "The peak learning rate.", above(0))

A field whose default is such a dataclass is a section inside of it. The ConfigDict, the help, docs/CONFIG.md, the
checks before a run and the typed options of a run all follow from the declarations.
"""

import dataclasses
import json
import math
import numbers
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from types import ModuleType
from typing import Any, TypeVar

from ml_collections import ConfigDict

from diva_jax.common import errors
from diva_jax.common.errors import UserError, brief

Section = TypeVar("Section")
_NO_FIELD, _ALL_FIELDS = "the config has no field", "--config=FILE --help lists all that exist"


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a value must be beside being of the default's type; `sentence` is an end such as "must be at least 1", and
    `values` are all that there are, where they are few."""

    holds: Callable[[Any], bool]
    sentence: str
    values: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Field:
    """The declaration of a field: its default, its documentation (a sentence) and its rule."""

    default: Any
    doc: str = ""
    rule: Rule | None = None

    def problem(self, value: Any) -> str | None:
        """What the value must be, where it is not: "must be a text"; None for an allowed value."""
        is_kind, kind = _KINDS.get(type(self.default), (lambda _: True, ""))
        if not is_kind(value):
            return f"must be {kind}"
        try:
            allowed = self.rule is None or self.rule.holds(value)
        except (TypeError, ValueError, AttributeError, OverflowError):
            allowed = False
        return None if allowed else self.rule.sentence


def field(default: Any, doc: str, rule: Rule | None = None) -> Any:
    """Declares a field of a section; its default also gives the type that values must have, and `doc` is a sentence."""
    metadata = {"doc": doc, "rule": rule}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def finite(value: Any) -> bool:
    """Whether it is a number, neither NaN nor infinite."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def is_regex(text: str) -> bool:
    """Whether a text is a regular expression."""
    try:
        re.compile(text)
    except re.error:
        return False
    return True


# Type of a default -> whether a value is of this type, as set in Python or read from JSON; and the type's name.
_KINDS = {
    bool: (lambda v: isinstance(v, bool), "True or False"),
    int: (lambda v: isinstance(v, numbers.Integral) and not isinstance(v, bool), "a whole number"),
    float: (finite, "a finite number"),
    str: (lambda v: isinstance(v, str), "a text"),
    tuple: (lambda v: isinstance(v, list | tuple), "a list"),
    dict: (lambda v: isinstance(v, Mapping), "a section"),
}


REGEX = Rule(is_regex, "must be a regular expression")


def at_least(least: float) -> Rule:
    """Numbers from `least` on."""
    return Rule(lambda v: v >= least, f"must be at least {least}")


def above(least: float) -> Rule:
    """Numbers above `least`."""
    return Rule(lambda v: v > least, f"must be above {least}")


def between(least: float, most: float) -> Rule:
    """Numbers from `least` to `most`."""
    return Rule(lambda v: least <= v <= most, f"must be {least} to {most}")


def below(least: float, most: float) -> Rule:
    """Numbers from `least` on that are below `most`."""
    return Rule(lambda v: least <= v < most, f"must be at least {least} and below {most}")


def pair(least: float, most: float) -> Rule:
    """Two numbers from `least` to `most`, the second not below the first."""
    said = f"must be two numbers, {least:g} <= low <= high <= {most:g}"
    return Rule(lambda v: len(v) == 2 and all(map(finite, v)) and least <= v[0] <= v[1] <= most, said)


def one_of(*values: Any) -> Rule:
    """These values alone."""
    said = " or ".join(repr(v) if v == "" else str(v) for v in values)
    return Rule(lambda v: v in values, f"must be {said}", values)


def choice(values: tuple[Any, ...], doc: str) -> Any:
    """Declares a field that has one of some values, of which the first is the default."""
    return field(values[0], doc, one_of(*values))


def declared(section: Any, prefix: str = "") -> dict[str, Field]:
    """The declarations of all fields of a section and of those inside of it, by dotted path after `prefix`. The section
    is a dataclass, an instance, whose values are the defaults, or a mapping, without documentation and rules."""
    if isinstance(section, ConfigDict | Mapping):
        return {prefix + path: Field(value) for path, value in flatten(section).items()}
    out, defaults = {}, section() if isinstance(section, type) else section
    for f in dataclasses.fields(defaults):
        value = getattr(defaults, f.name)
        if dataclasses.is_dataclass(value):
            out |= declared(value, f"{prefix}{f.name}.")
        else:
            out[prefix + f.name] = Field(value, f.metadata.get("doc", ""), f.metadata.get("rule"))
    return out


def config_dict(section: Any) -> ConfigDict:
    """The ConfigDict of a section: of a dataclass with its defaults, of an instance or a mapping with its values."""
    made = section() if isinstance(section, type) else section
    return ConfigDict(made if isinstance(made, Mapping) else dataclasses.asdict(made))


def default_of(module: ModuleType) -> ConfigDict:
    """The defaults of `SECTION` of an objective's or a task's module; empty for a module without one."""
    return config_dict(getattr(module, "SECTION", {}))


def declared_by(module: ModuleType) -> dict[str, Field]:
    """The declarations of `SECTION` of such a module."""
    return declared(getattr(module, "SECTION", {}))


def flatten(tree: Mapping[str, Any], whole: Collection[str] = (), prefix: str = "") -> dict[str, Any]:
    """Nested sections -> {dotted path: value}; the sections named in `whole` are values themselves."""
    out = {}
    for key, value in (tree.to_dict() if isinstance(tree, ConfigDict) else tree).items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in whole:
            out.update(flatten(value, whole, name + "."))
        else:
            out[name] = value
    return out


def differing(
    there: Mapping[str, Any], here: Mapping[str, Any], whole: Collection[str] = (), ignored: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """The fields in which two nested sections, as JSON has them, differ: dotted path -> (value there, value here).
    Sections in `whole` are compared as a whole, fields and sections in `ignored` are left out."""
    a, b = (flatten(json.loads(json.dumps(x)), whole) for x in (there, here))
    names = [name for name in a | b if a.get(name) != b.get(name)]
    ignored = [f"{name}." for name in ignored]
    return {name: (a.get(name), b.get(name)) for name in names if not f"{name}.".startswith(tuple(ignored))}


def differences(*args, **kw) -> list[str]:
    """The result of `differing` as sorted texts, "a.b (1 there, 2 here)"; arguments are the same."""
    return [f"{name} ({a!r} there, {b!r} here)" for name, (a, b) in sorted(differing(*args, **kw).items())]


def check(values: Mapping[str, Any], declarations: Mapping[str, Field], path: str = "config") -> None:
    """Checks the values of a section, nested or by dotted path; fields that it lacks are passed over. A UserError, with
    the section's path, where one is not declared, not of the type of its default or breaks its rule."""
    given = flatten(values, declarations)
    if unknown := [name for name in given if name not in declarations]:
        names, known = ([f"{path}.{n}".removeprefix("config.") for n in found] for found in (unknown, declarations))
        raise UserError(errors.unknown(_NO_FIELD, names, known, _ALL_FIELDS))
    for name, value in given.items():
        if problem := declarations[name].problem(value):
            raise UserError(f"{path}.{name}={brief(value)} {problem}")


def require(config: ConfigDict, paths: Iterable[str]) -> None:
    """A UserError, with the names that are meant, where a config lacks one of some fields or sections."""
    known = flatten(config)
    sections = {name[: m.start()] for name in known for m in re.finditer(r"\.", name)}
    if missing := [p for p in paths if p not in known and p not in sections and p not in config]:
        raise UserError(errors.unknown(_NO_FIELD, missing, known, _ALL_FIELDS))


def parse(section: type[Section], values: Mapping[str, Any], path: str) -> Section:
    """The typed object of a section from its values, with the defaults of missing fields; a UserError as `check`."""
    values = values.to_dict() if isinstance(values, ConfigDict) else values
    check(values, declared(section), path)
    return _with_values(section(), values)


def _with_values(defaults: Section, values: Mapping[str, Any]) -> Section:
    """A copy of an instance in which fields have the values of a (nested) mapping."""
    changes = {}
    for name, value in values.items():
        default = getattr(defaults, name)
        if dataclasses.is_dataclass(default):
            value = _with_values(default, value)
        changes[name] = tuple(value) if isinstance(default, tuple) else value
    return dataclasses.replace(defaults, **changes)
