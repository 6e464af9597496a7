"""A report's sections as data, which templates/page.html formats."""

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Label:
    """A name, with its unit, and a colour of the stylesheet (`role`, a key of `figures.COLOURS`) or a CSS colour."""

    text: str
    unit: str = ""
    role: str = ""
    colour: str = ""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A number with small lines below it, its exact value as a tooltip, and its CSS classes."""

    value: str
    below: Sequence[str] = ()
    exact: Any = None
    kind: str = ""


class Part:
    """A piece of a section: the macro of templates/parts.html that formats it, and the macro's arguments."""

    def __init__(self, macro: str, **arguments: Any):
        self.macro, self.arguments = macro, arguments


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page with a title; `note` is a line under the title."""

    title: str
    body: list[Part]
    note: str = ""
