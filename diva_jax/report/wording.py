"""Formats numbers, and states results as sentences."""

import math
from collections.abc import Iterable
from decimal import Decimal
from typing import NamedTuple

from diva_jax.common.results_schema import Difference, Score

DASH = "–"
# A row that needs more decimals has each of its numbers with its own power of ten.
_MAX_DECIMALS = 6
_NO_BREAK_SPACE = "\u00a0"


class Finding(NamedTuple):
    """A result for the header of the page: what was measured, the conclusion, CSS classes, see `direction`, and the
    values. Of an alarm, without values, the class is "bad", or "doubt" where the data do not show an effect."""

    what: str
    meaning: str
    kind: str = ""
    figures: str = ""


def compact(value: float, digits: int = 3, zeros: bool = False) -> str:
    """Formats a number with `digits` significant digits: `4,600`, `0.25`, `1e−6`. `zeros` keeps trailing zeros."""
    if value == 0:
        return "0"
    size = abs(value)
    if 10_000 <= size < 1e12 or (1000 <= size < 10_000 and value == round(value)):
        return f"{value:,.0f}".replace("-", "−")
    text = f"{value:{'#' if zeros else ''}.{digits}g}".removesuffix(".")
    if 1e-5 <= size < 1e12:
        text = f"{Decimal(text):f}"
    elif "e" in text:
        mantissa, power = text.split("e")
        text = f"{mantissa}e{int(power)}"
    return text.replace("-", "−")


def places(values: Iterable[float | None], unit: str) -> int | None:
    """The decimals with which all numbers of a row (scores, differences, ends of intervals) are written: "%" has one,
    other units as many as give the largest value three significant digits; None where they would be more than six."""
    if unit == "%":
        return 1
    largest = max((abs(v) for v in values if v is not None), default=0)
    if not largest:
        return 0
    decimals = max(0, 2 - math.floor(math.log10(largest)))
    return decimals if decimals <= _MAX_DECIMALS else None


def places_of(scores: Iterable[Score | Difference | None], unit: str) -> int | None:
    """As `places`, of those of some scores and differences that are known, with their intervals."""
    return places([x for s in scores if s for x in (s.value, *(s.known_interval or ()))], unit)


def number(value: float | None, unit: str, decimals: int | None = None) -> str:
    """Formats a score; a dash for None. Without `decimals`, "%" has one and others three significant digits."""
    if value is None:
        return DASH
    decimals = 1 if unit == "%" else decimals
    if decimals is None:
        return compact(value, zeros=True)
    text = f"{value:,.{decimals}f}".replace("-", "−")
    return text.removeprefix("−") if not text.strip("−0.,") else text


def signed(value: float | None, unit: str, decimals: int | None = None) -> str:
    """Formats a number with its sign: `+6.7`."""
    text = number(value, unit, decimals)
    return text if text[0] in "−–" or not text.strip("0.,") else f"+{text}"


def interval(ends: list[float] | None, unit: str, decimals: int | None = None) -> str:
    """Formats an interval: `1.5 to 11.9`, which does not break over lines, or "" for None."""
    return f"{_NO_BREAK_SPACE}to{_NO_BREAK_SPACE}".join(number(e, unit, decimals) for e in ends) if ends else ""


def excludes_zero(ends: list[float] | None) -> bool | None:
    """Returns whether zero is outside of an interval; None without an interval."""
    return None if ends is None else not ends[0] <= 0 <= ends[1]


def direction(difference: Difference, better: str, doubted: bool = False) -> str:
    """The CSS classes of a difference: "zero" where zero is within the interval; else "up" or "down" by the sign and,
    where better values of the metric are "higher" or "lower", "won" or "lost"; "" without an interval and a sign.
    Instead of "won" it is "doubted" where something else says that it is no improvement."""
    if not difference.sign:
        return "" if difference.known_interval is None else "zero"
    up = difference.sign > 0
    colour = "lost" if up != (better == "higher") else "doubted" if doubted else "won"
    arrow = "up" if up else "down"
    return f"{arrow} {colour}" if better else arrow


def change(before: Score, after: Score, difference: Difference, unit: str) -> str:
    """Formats a change: `19.3 → 25.9 (+6.7, 95% interval 1.5 to 11.9)`, without line breaks around the arrow."""
    ends, decimals = difference.known_interval, places_of((before, after, difference), unit)
    by = signed(difference.difference, unit, decimals)
    if ends:
        by += f", 95% interval {interval(ends, unit, decimals)}"
    first, now = (number(s.score, unit, decimals) for s in (before, after))
    return f"{first}{_NO_BREAK_SPACE}→{_NO_BREAK_SPACE}{now} ({by})"


def verdict(difference: Difference, better: str) -> str:
    """Returns the conclusion from a paired difference, as one sentence; `better` as for `direction`."""
    if difference.all_agree and not difference.sign:
        return "All items differ by the same, so there is no interval."
    if difference.runs and not difference.runs_interval:
        return "All runs differ by the same, so there is no interval over runs, and chance cannot be excluded."
    kind = direction(difference, better)
    if not kind:
        return "This difference has no interval, so chance cannot be excluded."
    if kind == "zero":
        if difference.mcnemar and excludes_zero(difference.interval):
            return "Zero is outside of the interval, but the exact test does not exclude chance: no difference shown."
        over = "" if not difference.runs_interval or excludes_zero(difference.runs_interval) else " over runs"
        return f"Zero is within the interval{over}: these data show no difference."
    names = {"up": "Higher", "down": "Lower", "won": "Better", "lost": "Worse"}
    why = "every resample has the same difference" if difference.all_agree else "zero is outside of the interval"
    return f"{names[kind.split()[-1]]}: {why}."


def p_value(p: float) -> str:
    """Formats a p value with its relation: `< 0.001`, `= 0.039`."""
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"


def duration(seconds: float) -> str:
    """Formats a time: `0.4 s`, `81 s`, `12 min`, `3 h 20 min`."""
    if seconds < 600:
        return f"{seconds:.{1 if seconds < 10 else 0}f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
