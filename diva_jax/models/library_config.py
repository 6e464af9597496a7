"""Reads config files of diffusers, transformers and open_clip; what is not supported is an error that names it."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from diva_jax.common.errors import UserError, brief
from diva_jax.common.fields import Field, Rule, between, finite

# Beyond this width or vocabulary, one matrix alone has a terabyte.
_MAX_SIZE = 2**20
_SIZE = between(1, _MAX_SIZE)
_MAX_LAYERS = 64
_MAX_ENTRIES = 64


class LibraryConfig(NamedTuple):
    """Options of a config file, or of a section of it; `where` and `prefix` ("vision_cfg.") name them in messages.
    Every method raises a UserError, one sentence that names the option and its value, where the option is not what the
    method returns. A missing option has the default; null stands for a default that is no whole number and no text."""

    options: Mapping[str, Any]
    where: str
    prefix: str = ""

    def refuse(self, name: str, must: str) -> NoReturn:
        """Raises the UserError for an option; `must` says what it must be."""
        value = brief(self.options.get(name))
        raise UserError(f"{self.where} has {self.prefix}{name}={value}: {must}")

    def require_class(self, kind: str, key: str = "_class_name", name: str = "") -> None:
        """Checks that `key`, where the file has it, is `kind`, the class `name` of its library."""
        given = self.options.get(key, kind)
        if given != kind:
            raise UserError(f"{self.where} is that of a {brief(given)}, give the folder of a {name or kind}")

    def check(
        self, read: Collection[str], fixed: Mapping[str, Sequence], *, lists: bool = False, hint: str = ""
    ) -> None:
        """Checks that all options are known; names that begin with an underscore are metadata. Options in `read` may
        have any value, those in `fixed` the values that are implemented, with `lists` also a list of them with one
        entry per block. `hint` says what to use instead."""
        for name, value in self.options.items():
            if name.startswith("_") or name in read or (name not in fixed and value is None):
                continue
            if name not in fixed:
                option = brief(f"{self.prefix}{name}")
                raise UserError(f"{self.where} has the unknown option {option}={brief(value)}, remove it")
            entries = value if lists and isinstance(value, list | tuple) else [value]
            if not all(entry in fixed[name] for entry in entries):
                allowed = " or ".join(map(repr, fixed[name]))
                self.refuse(name, f"only {allowed} is supported" + (f", {hint}" if hint else ""))

    def section(self, name: str) -> "LibraryConfig":
        """An option that is an object of options itself; empty where it is missing or null."""
        value = self.options.get(name)
        if not isinstance(value, Mapping | None):
            self.refuse(name, "it must be an object of options")
        return LibraryConfig(value or {}, self.where, f"{self.prefix}{name}.")

    def get(self, name: str, default: Any, rule: Rule | None = None) -> Any:
        """A value of the default's type: a number, a text, true or false; a whole number without a rule is a size."""
        value = self.options.get(name, default)
        if value is None and isinstance(default, float | bool):
            value = default
        if rule is None and type(default) is int:
            rule = _SIZE
        if problem := Field(default, "", rule).problem(value):
            self.refuse(name, f"it {problem}")
        return float(value) if isinstance(default, float) else value

    def sizes(self, name: str, default: Any, count: int | None = None) -> tuple[int, ...]:
        """A list of positive integers; a single one is a list of one or, with `count`, for all of so many blocks."""
        value = self.options.get(name, default)
        entries = tuple(value) if isinstance(value, list | tuple) else (value,) * (count or 1)
        most = _MAX_LAYERS if "layers" in name else _MAX_SIZE
        if not 1 <= len(entries) <= _MAX_ENTRIES or not all(type(e) is int and 0 < e <= most for e in entries):
            self.refuse(name, f"it must be a positive integer of at most {most}, or a list of up to {_MAX_ENTRIES}")
        if count and len(entries) != count:
            self.refuse(name, f"give one value per block, {count}")
        return entries

    def channels(self, name: str, default: Sequence[float]) -> tuple[float, ...]:
        """Three numbers, one per channel of an image; a single number stands for all three."""
        value = self.options.get(name) or default
        entries = tuple(value) if isinstance(value, list | tuple) else (value,) * 3
        if len(entries) != 3 or not all(finite(v) and abs(v) < 1e38 for v in entries):
            self.refuse(name, "it must be three numbers")
        return tuple(map(float, entries))

    def names(self, name: str, default: tuple[str, ...], count: int) -> tuple[str, ...]:
        """A list of `count` names, one per block."""
        value = self.options.get(name, default)
        if not isinstance(value, list | tuple) or not all(isinstance(n, str) for n in value) or len(value) != count:
            self.refuse(name, f"it must be a list of {count} names, one per block")
        return tuple(value)

    def require_multiple(self, name: str, values: Iterable[int], divisor: str, divisors: Iterable[int]) -> None:
        """Checks that each value of an option is a multiple of its divisor, that of the option `divisor`."""
        for value, by in zip(values, divisors, strict=True):
            if value % by:
                raise UserError(f"{self.where} has {name} {value}, it must be a multiple of {divisor} {by}")
