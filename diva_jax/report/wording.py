"""Numbers as text, and the sentences that say what they mean."""

import math
from decimal import Decimal
from typing import Any, NamedTuple

_DASH = "–"


class Finding(NamedTuple):
    """A sentence for the head of the page.

    Attributes:
      what: was measured.
      figures: what came out.
      meaning: what one may say about it.
      kind: up, down, zero (a difference within its interval) or "".
    """

    what: str
    figures: str
    meaning: str
    kind: str = ""


def compact(value: float, digits: int = 3, zeros: bool = False) -> str:
    """`4,600`, `0.25`, `1e-6`: a number with so many significant digits, trailing zeros only where asked for."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000 or (abs(value) >= 1000 and value == round(value)):
        return f"{value:,.0f}".replace("-", "−")
    text = f"{value:{'#' if zeros else ''}.{digits}g}".removesuffix(".")
    if abs(value) >= 1e-5:
        text = f"{Decimal(text):f}"
    elif "e" in text:
        mantissa, power = text.split("e")
        text = f"{mantissa}e{int(power)}"
    return text.replace("-", "−")


def number(value: float | None, unit: str) -> str:
    """A score: one digit behind the point for %, else three significant ones; a dash for none."""
    if value is None or not math.isfinite(value):
        return _DASH
    return f"{value:.1f}".replace("-", "−") if unit == "%" else compact(value, zeros=True)


def signed(value: float | None, unit: str) -> str:
    """`+6.7`."""
    text = number(value, unit)
    return text if text[0] in "−–" else f"+{text}"


def interval(ends: list[float] | None, unit: str) -> str:
    """`1.5 to 11.9`, or "" for none."""
    return f"{number(ends[0], unit)} to {number(ends[1], unit)}" if ends else ""


def beyond(ends: list[float] | None) -> bool | None:
    """Whether zero lies outside of an interval; None where there is no interval."""
    return None if ends is None else not ends[0] <= 0 <= ends[1]


def direction(difference: dict[str, Any]) -> str:
    """up, down, zero within the interval, or "" where there is none: the page's CSS classes."""
    known = beyond(difference.get("interval"))
    return "" if known is None else ("zero" if not known else ("up" if difference["difference"] > 0 else "down"))


def change(before: dict[str, Any], after: dict[str, Any], difference: dict[str, Any], unit: str) -> str:
    """`19.3 → 25.9 (+6.7, 95% interval 1.5 to 11.9)`, the arrow bound to its numbers."""
    by = signed(difference["difference"], unit)
    if ends := difference.get("interval"):
        by += f", 95% interval {interval(ends, unit)}"
    return f"{number(before['score'], unit)}\u00a0→\u00a0{number(after['score'], unit)} ({by})"


def verdict(difference: dict[str, Any]) -> str:
    """What a paired difference with its interval lets one say, in one sentence."""
    test, doubt = difference.get("mcnemar"), ""
    if test and test["p"] >= 0.05:
        doubt = ", but the exact test does not exclude chance"
    return {
        "": "There is no interval for this difference, so nothing can be said about chance.",
        "zero": "Zero is within the interval: these data show no difference.",
        "up": f"Higher, beyond its interval{doubt}.",
        "down": f"Lower, beyond its interval{doubt}.",
    }[direction(difference)]


def p_value(p: float) -> str:
    """`< 0.001`, `= 0.039`."""
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"


def mcnemar(test: dict[str, Any] | None, items: str) -> str:
    """`10 pairs won, 2 lost, exact McNemar p = 0.039`, or "" for none."""
    if not test:
        return ""
    return f"{test['won']} {items} won, {test['lost']} lost, exact McNemar p {p_value(test['p'])}"
