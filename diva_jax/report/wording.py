"""Formats numbers, and states results as sentences."""

import math
from decimal import Decimal
from typing import Any, NamedTuple

_DASH = "–"


class Finding(NamedTuple):
    """A result for the header of the page.

    Attributes:
      what: what was measured.
      figures: the measured values.
      meaning: the conclusion that they allow.
      kind: "up", "down", "zero" (the interval of the difference contains zero), or "" without an interval.
    """

    what: str
    figures: str
    meaning: str
    kind: str = ""


def compact(value: float, digits: int = 3, zeros: bool = False) -> str:
    """Formats a number with `digits` significant digits: `4,600`, `0.25`, `1e-6`. `zeros` keeps trailing zeros."""
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
    """Formats a score: one decimal for %, else three significant digits; a dash for None or a value not finite."""
    if value is None or not math.isfinite(value):
        return _DASH
    return f"{value:.1f}".replace("-", "−") if unit == "%" else compact(value, zeros=True)


def signed(value: float | None, unit: str) -> str:
    """Formats a number with its sign: `+6.7`."""
    text = number(value, unit)
    return text if text[0] in "−–" else f"+{text}"


def interval(ends: list[float] | None, unit: str) -> str:
    """Formats an interval: `1.5 to 11.9`, or "" for None."""
    return f"{number(ends[0], unit)} to {number(ends[1], unit)}" if ends else ""


def excludes_zero(ends: list[float] | None) -> bool | None:
    """Returns whether zero is outside of an interval; None without an interval."""
    return None if ends is None else not ends[0] <= 0 <= ends[1]


def direction(difference: dict[str, Any]) -> str:
    """Returns the CSS class of a difference: "up", "down", "zero" (within the interval), or "" without an interval."""
    known = excludes_zero(difference.get("interval"))
    return "" if known is None else ("zero" if not known else ("up" if difference["difference"] > 0 else "down"))


def change(before: dict[str, Any], after: dict[str, Any], difference: dict[str, Any], unit: str) -> str:
    """Formats a change: `19.3 → 25.9 (+6.7, 95% interval 1.5 to 11.9)`, without line breaks around the arrow."""
    by = signed(difference["difference"], unit)
    if ends := difference.get("interval"):
        by += f", 95% interval {interval(ends, unit)}"
    return f"{number(before['score'], unit)}\u00a0→\u00a0{number(after['score'], unit)} ({by})"


def verdict(difference: dict[str, Any]) -> str:
    """Returns the conclusion from a paired difference and its interval, as one sentence."""
    test, doubt = difference.get("mcnemar"), ""
    if test and test["p"] >= 0.05:
        doubt = ", but the exact test does not exclude chance"
    return {
        "": "This difference has no interval, so chance cannot be excluded.",
        "zero": "Zero is within the interval: these data show no difference.",
        "up": f"Higher: zero is outside of the interval{doubt}.",
        "down": f"Lower: zero is outside of the interval{doubt}.",
    }[direction(difference)]


def p_value(p: float) -> str:
    """Formats a p value with its relation: `< 0.001`, `= 0.039`."""
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"


def mcnemar(test: dict[str, Any] | None, items: str) -> str:
    """Formats a test: `10 pairs won, 2 lost, exact McNemar p = 0.039`, or "" for None."""
    if not test:
        return ""
    return f"{test['won']} {items} won, {test['lost']} lost, exact McNemar p {p_value(test['p'])}"
