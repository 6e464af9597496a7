"""Figures of a report: as SVG in the colours of the page's stylesheet, and as PNG files. Importing matplotlib is slow,
so that this module is imported where a report is written."""

import contextlib
import dataclasses
import functools
import io
import json
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import Patch

from diva_jax.common.errors import printable

_TEMPLATES = Path(__file__).with_name("templates")
# Role -> [light, dark]. Series colours have a contrast of at least 3:1 against the page in both schemes. They also
# differ in lightness, so that readers with colour vision deficiency can distinguish them.
COLOURS = json.loads((_TEMPLATES / "colours.json").read_text("utf-8"))
LIGHT = {role: light for role, (light, _) in COLOURS.items()}
_VARIABLES = {light: f"var(--{role})" for role, light in LIGHT.items()}
_SERIES = 6
# Widths of charts [CSS pixels]: full and half of a wide page, and a phone. Charts are drawn once per width and not
# scaled, so that their text has the same size as the page's.
WIDE, HALF, NARROW = 918, 426, 328
# One unit of matplotlib, a point, is one CSS pixel of the page and two pixels of a PNG file, which says who made it.
DPI, MADE_BY = 72, "diva_jax.report"
_PNG = {"dpi": 144, "pad_inches": 18 / DPI, "metadata": {"Software": MADE_BY}}
# matplotlib's style, in which a role stands for its light colour.
_STYLE = {name: LIGHT.get(value, value) for name, value in json.loads((_TEMPLATES / "style.json").read_text()).items()}


@dataclasses.dataclass
class Drawing:
    """A figure, and its tooltips as [(x, y, width, height, text)] in pixels from the upper left corner."""

    figure: Figure
    tooltips: list[tuple[float, float, float, float, str]] = dataclasses.field(default_factory=list)


class Chart(NamedTuple):
    """A chart that can be drawn at any width (`draw`: width [pixels] -> Drawing). Title and legend, (name, index of the
    colour) of each series, are in the PNG file, `name`, but not in the SVG; `half`: of the width of a wide page."""

    name: str
    title: str
    legend: Sequence[tuple[str, int]]
    draw: Callable[[float], Drawing]
    half: bool = False
    note: str = ""

    @property
    def width(self) -> int:
        return HALF if self.half else WIDE

    def svg(self, width: float) -> Markup:
        """Returns an `<svg>` element whose colours are variables of the page's stylesheet."""
        # The salt makes the names of its shapes the same in each run, and different from those of other charts.
        with _style(f"{self.name} {width}"):
            drawing, file = self.draw(width), io.StringIO()
            drawing.figure.savefig(file, format="svg", metadata={"Date": None})
        return _inline(file.getvalue(), plain(self.title), drawing.tooltips)

    def png(self) -> bytes:
        """Returns a PNG file in light colours: 2 pixels per CSS pixel, with a margin of 18."""
        width, file = self.width, io.BytesIO()
        with _style():
            figure = self.draw(width).figure
            above = 1 + 8 / (figure.get_figheight() * DPI)
            if len(self.legend) > 1:
                handles = [Patch(color=light_colour(i), label=plain(name)) for name, i in self.legend]
                room = 40 + max(text_width(handle.get_label(), 12) for handle in handles)
                legend = figure.legend(
                    handles=handles, loc="lower left", bbox_to_anchor=(0, above), frameon=False, borderpad=0,
                    ncols=max(1, int(width / room)), handlelength=1, handleheight=0.8, borderaxespad=0.3,
                    labelcolor=LIGHT["ink"],
                )  # fmt: skip
                above += (legend.get_window_extent().height + 8) / (figure.get_figheight() * DPI)
            title = textwrap.fill(plain(self.title), int(width / 8))
            figure.text(0, above, title, size=14, color=LIGHT["ink"], va="bottom")
            figure.set_facecolor(LIGHT["panel"])
            figure.savefig(file, format="png", bbox_inches="tight", **_PNG)
        return file.getvalue()


@contextlib.contextmanager
def _style(salt: str = "") -> Iterator[None]:
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": salt}), warnings.catch_warnings():
        # Browsers have fonts for the characters that matplotlib's font lacks.
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def in_pairs(charts: Sequence[Chart]) -> list[Chart]:
    """Lays out charts in pairs. If their number is odd, the first one takes the full width."""
    return [chart._replace(half=i >= len(charts) % 2) for i, chart in enumerate(charts)]


def colour_role(index: int) -> str:
    """Returns the key in `COLOURS` of a series. Series 0, the reference of comparisons, has a neutral grey."""
    return f"s{index if index < _SERIES else 1 + (index - 1) % (_SERIES - 1)}"


def light_colour(index: int) -> str:
    return LIGHT[colour_role(index)]


@functools.cache
def text_width(text: str, size: float) -> float:
    """An upper bound of a text's width [pixels]: most fonts of browsers are narrower than that of the PNG files."""
    font = get_font(findfont("DejaVu Sans"))
    font.set_size(size, DPI)
    font.set_text(plain(text))
    return 1.08 * font.get_width_height()[0] / 64


def plain(text: str) -> str:
    """A text on one line, in which characters that cannot be drawn are written as escapes."""
    return printable(" ".join(text.split()))


def _inline(svg: str, label: str, tooltips) -> Markup:
    """Turns matplotlib's SVG file into an element of the page."""
    root = ElementTree.fromstring(svg)
    root.attrib = {"viewBox": root.get("viewBox"), "role": "img", "aria-label": label}
    hrefs = "{http://www.w3.org/1999/xlink}href"
    used = {e.get(hrefs, "#")[1:] for e in root.iter()}
    for e in root.iter():
        e.tag, e.text, e.tail = e.tag.rpartition("}")[2], (e.text or "").strip(), None
        e[:] = [child for child in e if child.tag.rpartition("}")[2] not in ("metadata", "style")]
        if e.get("id") not in used or e.get("transform", "").startswith("rotate(-0 "):
            e.attrib = {name: value for name, value in e.items() if name not in ("id", "transform")}
        if hrefs in e.attrib:
            e.set("href", e.attrib.pop(hrefs))
        style = re.sub(r"font-family: [^;]*; ?", "", e.get("style", ""))
        e.set("style", re.sub("#[0-9a-f]{6}", lambda colour: _VARIABLES.get(colour[0], colour[0]), style))
        e.set("d", re.sub(r"(\.\d\d)\d+", r"\1", e.get("d", "")).replace("\n", ""))
        e.attrib = {name: value for name, value in e.items() if value}
    for x, y, width, height, text in tooltips:
        place = {"x": x, "y": y, "width": width, "height": height}
        area = ElementTree.SubElement(root, "rect", {k: f"{v:.5g}" for k, v in place.items()}, fill="transparent")
        ElementTree.SubElement(area, "title").text = "\n".join(map(plain, text.split("\n")))
    return Markup(ElementTree.tostring(root, encoding="unicode", method="html"))


class Label(NamedTuple):
    """A name and the CSS colour beside it, if any."""

    text: str
    colour: str = ""


class Part:
    """A piece of a section: the macro of templates/parts.html that formats it, and the macro's arguments."""

    def __init__(self, macro: str, **arguments: Any):
        self.macro, self.arguments = macro, arguments


class Section(NamedTuple):
    """A part of the page with a title; `note` is a line under the title."""

    title: str
    body: list[Part]
    note: str = ""
