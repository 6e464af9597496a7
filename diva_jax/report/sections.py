"""A report's sections as data: what `page` lays out and `write` turns into PNGs."""

import dataclasses
from collections.abc import Sequence
from html import escape

from diva_jax.report.canvas import series
from diva_jax.report.charts import Chart

_STACKED = 4  # Columns, the first one on a line of its own, that a phone has room for.


@dataclasses.dataclass(frozen=True)
class Section:
    """A titled part of the page: `body` is HTML and charts in order, `note` a line under the title."""

    title: str
    body: list[str | Chart]
    note: str = ""


def swatch(index: int) -> str:
    """A small square in a series' colour, and a word joiner: it stays with what it marks."""
    return f'<i class="swatch" style="background:var(--{series(index)})"></i>&#8288;'


def paragraph(text: str, kind: str = "") -> str:
    return f"<p{f' class={kind}' if kind else ''}>{escape(text)}</p>"


def table(head: list[str], rows: list[list[str]], short: bool = False) -> str:
    """A table of HTML cells; each row's first is its header.

    On a phone the header takes a line of its own, and a table of many columns that are not `short` scrolls by itself;
    the roles keep it a table for a screen reader there.
    """
    top = "".join(f'<th scope="col" role="columnheader">{h}</th>' for h in head)
    lines = "".join(
        f'<tr role="row"><th scope="row" role="rowheader">{row[0]}</th>'
        + "".join(f'<td role="cell">{value}</td>' for value in row[1:])
        + "</tr>"
        for row in rows
    )
    kind = "stacks" if short or len(head) <= _STACKED else "scrolls"
    return (
        f'<div class="{kind}" style="--columns:{len(head) - 1}"><table role="table">'
        f'<thead role="rowgroup"><tr role="row">{top}</tr></thead><tbody role="rowgroup">{lines}</tbody></table></div>'
    )


def cell(value: str, below: Sequence[str] = (), exact: object = None, kind: str = "") -> str:
    """A number, in small lines below it its interval and more, and the input's own digits as a tooltip."""
    tip = f' title="{escape(str(exact))}"' if exact is not None else ""
    small = "".join(f"<small>{escape(line)}</small>" for line in below if line)
    return f"<b{tip}{f' class={kind}' if kind else ''}>{escape(value)}</b>{small}"
