"""A report's sections as data, which `page` formats as HTML and `write` as PNG files."""

import dataclasses
import re
from collections.abc import Sequence
from html import escape

from diva_jax.report.canvas import series
from diva_jax.report.charts import Chart

_STACKED = 4  # Largest number of columns that fit on a phone if the first one has its own line.
_TAG = re.compile("<[^>]*>|&#8288;")


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page with a title: `body` is HTML and charts in order, `note` is a line under the title."""

    title: str
    body: list[str | Chart]
    note: str = ""


def swatch(index: int) -> str:
    """Returns a small square in a series' colour, and a word joiner that prevents a line break after it."""
    return f'<i class="swatch" style="background:var(--{series(index)})"></i>&#8288;'


def paragraph(text: str, kind: str = "") -> str:
    """Returns a `<p>` element with escaped text; `kind` is its CSS class."""
    return f"<p{f' class={kind}' if kind else ''}>{escape(text)}</p>"


def table(head: list[str], rows: list[list[str]], short: bool = False) -> str:
    """Returns a table of HTML cells; the first cell of each row is its header.

    On a phone, row headers are placed on their own line; in a table with many columns each cell is a line with the
    name of its column, unless cells are `short`. The ARIA roles are needed because the CSS for phones changes
    `display`, which would otherwise hide the table's structure from screen readers.
    """
    names = [_TAG.sub("", h) for h in head]
    top = "".join(f'<th scope="col" role="columnheader">{h}</th>' for h in head)
    lines = "".join(
        f'<tr role="row"><th scope="row" role="rowheader">{row[0]}</th>'
        + "".join(
            f'<td role="cell" data-name="{name}"><div>{value}</div></td>'
            for name, value in zip(names[1:], row[1:], strict=True)
        )
        + "</tr>"
        for row in rows
    )
    kind = "stacks" if short or len(head) <= _STACKED else "lines"
    return (
        f'<div class="{kind}" style="--columns:{len(head) - 1}"><table role="table">'
        f'<thead role="rowgroup"><tr role="row">{top}</tr></thead><tbody role="rowgroup">{lines}</tbody></table></div>'
    )


def cell(value: str, below: Sequence[str] = (), exact: object = None, kind: str = "") -> str:
    """Returns a number with small lines below it (its interval, for example) and the exact value as a tooltip."""
    tip = f' title="{escape(str(exact))}"' if exact is not None else ""
    mark = f' class="{kind}"' if kind else ""
    small = "".join(f"<small>{escape(line)}</small>" for line in below if line)
    return f"<b{tip}{mark}>{escape(value)}</b>{small}"
