"""A drawing made of simple shapes, written as inline SVG (coloured by the page's CSS) or as a PNG (light colours).

Both outputs are drawn from the same list of shapes, so a PNG shows what the page shows. PNGs are drawn with Pillow
and the font that it includes.
"""

import dataclasses
import functools
import html

from PIL import Image, ImageDraw, ImageFont, ImageOps

# Role -> (light, dark). Series colours have a contrast of at least 3:1 against the page in both schemes. They also
# differ in lightness, so that readers with colour vision deficiency can distinguish them.
COLOURS = {
    "page": ("#fbfaf8", "#15171b"),
    "panel": ("#ffffff", "#1c1f25"),
    "ink": ("#1d2026", "#e8e6e1"),
    "muted": ("#5d6470", "#a3a8b2"),
    "grid": ("#e4e2dd", "#30343c"),
    "axis": ("#9a9ea6", "#6b717c"),
    "s0": ("#7d8798", "#97a1b1"),
    "s1": ("#1559b7", "#6fb1ff"),
    "s2": ("#b4540a", "#f2a65e"),
    "s3": ("#0f766e", "#5fd0bf"),
    "s4": ("#9333a8", "#d79bea"),
    "s5": ("#8a6d00", "#dcc05a"),
    "won": ("#15703f", "#6fd39b"),
    "lost": ("#b3261e", "#ff9a8f"),
}
SERIES = 6
_FONT = 'font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif"'
# Replacements for characters that Pillow's included font does not have.
_PLAIN = str.maketrans({"−": "-", "–": "-", "→": ">", "×": "x", "“": '"', "”": '"', "’": "'"})
_DRAWN, _KEPT = 4, 2  # A PNG is drawn at 4 pixels per unit and reduced to 2, which smooths edges.
_MARGIN = 18  # Margin around a PNG [units].


def series(index: int) -> str:
    """Returns the colour role of a series. Series 0, the reference of comparisons, has a neutral grey."""
    return f"s{index if index < SERIES else 1 + (index - 1) % (SERIES - 1)}"


@functools.cache
def _font(size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def text_width(string: str, size: float = 12) -> float:
    """Returns an upper bound of a text's width [units] in the fonts that browsers use for it."""
    return 1.16 * _font(size).getlength(string.replace("−", "+").translate(_PLAIN))


@dataclasses.dataclass(frozen=True)
class Shape:
    """One shape.

    Attributes:
      kind: "path" (open line), "area" (filled polygon), "dot" or "text".
      points: [(x, y)] in units, y pointing down. The position of a dot or a text is the first point.
      role: a key of COLOURS.
      width: the stroke width of a path, the radius of a dot, or the font size of a text [units].
      opacity: 0 to 1.
      dash: whether a path is dashed.
      string: the content of a text.
      anchor: the horizontal alignment of a text: "start", "middle" or "end".
      title: the tooltip.
    """

    kind: str
    points: tuple[tuple[float, float], ...]
    role: str
    width: float = 1.0
    opacity: float = 1.0
    dash: bool = False
    string: str = ""
    anchor: str = "start"
    title: str = ""


class Canvas:
    """A list of shapes on a plane of `width` x `height` units (CSS pixels at the page's normal size).

    Args:
      width, height: the size [units].
      label: a description of the drawing for screen readers.
    """

    def __init__(self, width: float, height: float, label: str):
        self.width, self.height, self.label = width, height, label
        self._shapes: list[Shape] = []

    def path(self, points, role: str, width: float = 1.0, opacity: float = 1.0, dash: bool = False, title: str = ""):
        """Adds an open line through `points`; see `Shape` for the arguments."""
        self._shapes.append(Shape("path", tuple(points), role, width, opacity, dash, title=title))

    def area(self, points, role: str, opacity: float = 1.0, title: str = ""):
        """Adds a filled polygon with the corners `points`."""
        self._shapes.append(Shape("area", tuple(points), role, 0, opacity, title=title))

    def rect(self, x: float, y: float, w: float, h: float, role: str, opacity: float = 1.0, title: str = ""):
        """Adds a filled rectangle. With opacity 0 it is invisible and serves as the area of a tooltip."""
        self.area([(x, y), (x + w, y), (x + w, y + h), (x, y + h)], role, opacity, title)

    def dot(self, x: float, y: float, radius: float, role: str, title: str = ""):
        """Adds a filled circle with its centre at (x, y)."""
        self._shapes.append(Shape("dot", ((x, y),), role, radius, title=title))

    def text(self, x: float, y: float, string: str, role: str = "muted", size: float = 12, anchor: str = "start"):
        """Adds a text whose baseline is at `y`."""
        self._shapes.append(Shape("text", ((x, y),), role, size, string=string, anchor=anchor))

    def svg(self) -> str:
        """Returns an `<svg>` element whose colours are the page's CSS variables."""
        body = "".join(_svg(s) for s in self._shapes)
        return (
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="img" '
            f'aria-label="{html.escape(self.label)}" {_FONT}>{body}</svg>'
        )

    def png(self) -> Image.Image:
        """Returns an RGB image in light colours: 2 pixels per unit, with a margin of 18 units on each side."""
        size = (round(self.width * _DRAWN), round(self.height * _DRAWN))
        image = Image.new("RGB", size, COLOURS["panel"][0])
        draw = ImageDraw.Draw(image)
        for shape in self._shapes:
            if shape.opacity:
                _draw(draw, shape)
        image = image.reduce(_DRAWN // _KEPT)
        return ImageOps.expand(image, _MARGIN * _KEPT, COLOURS["panel"][0])


def _svg(s: Shape) -> str:
    colour, fade = f"var(--{s.role})", f' opacity="{s.opacity:g}"' if s.opacity < 1 else ""
    tip = f"<title>{html.escape(s.title)}</title>" if s.title else ""
    (x, y), dash = s.points[0], ' stroke-dasharray="4 4"' if s.dash else ""
    if s.kind == "text":
        return (
            f'<text x="{x:.5g}" y="{y:.5g}" font-size="{s.width:g}" fill="{colour}" '
            f'text-anchor="{s.anchor}">{html.escape(s.string)}</text>'
        )
    if s.kind == "dot":
        return f'<circle cx="{x:.5g}" cy="{y:.5g}" r="{s.width:g}" fill="{colour}">{tip}</circle>'
    points = " ".join(f"{a:.5g},{b:.5g}" for a, b in s.points)
    if s.kind == "area":
        return f'<polygon points="{points}" fill="{colour}"{fade}>{tip}</polygon>'
    return (
        f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{s.width:g}" '
        f'stroke-linejoin="round"{dash}{fade}>{tip}</polyline>'
    )


def _mixed(role: str, opacity: float) -> tuple[int, ...]:
    """Returns the light colour of a role, blended over the panel's colour."""
    over, under = ([int(COLOURS[r][0][i : i + 2], 16) for i in (1, 3, 5)] for r in (role, "panel"))
    return tuple(round(opacity * a + (1 - opacity) * b) for a, b in zip(over, under, strict=True))


def _draw(draw: ImageDraw.ImageDraw, s: Shape) -> None:
    points, size = [(x * _DRAWN, y * _DRAWN) for x, y in s.points], s.width * _DRAWN
    colour, (x, y) = _mixed(s.role, s.opacity), points[0]
    if s.kind == "text":
        anchor = {"start": "ls", "middle": "ms", "end": "rs"}[s.anchor]
        draw.text((x, y), s.string.translate(_PLAIN), font=_font(size), fill=colour, anchor=anchor)
    elif s.kind == "dot":
        draw.ellipse((x - size, y - size, x + size, y + size), fill=colour)
    elif s.kind == "area":
        draw.polygon(points, fill=colour)
    elif s.dash:
        for a, b in _dashes(points[0], points[-1]):
            draw.line((a, b), fill=colour, width=round(size))
    else:
        draw.line(points, fill=colour, width=round(size), joint="curve")


def _dashes(start, end):
    """Returns the dashes of a straight line: every second segment of about 4 units."""
    length = max(abs(end[0] - start[0]), abs(end[1] - start[1]))
    pieces = max(1, round(length / (4 * _DRAWN)))
    at = [tuple(p + (q - p) * i / pieces for p, q in zip(start, end, strict=True)) for i in range(pieces + 1)]
    return zip(at[:-1:2], at[1::2], strict=False)
