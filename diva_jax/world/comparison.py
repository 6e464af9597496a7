"""Paired statistics over the runs of an experiment, as a table in Markdown and as a figure.

A difference is between the means over seeds of two arms on the same items. It has two intervals: over items (bootstrap,
drawn within each stratum) and over seeds (Student's t, of the differences seed by seed). A claim needs both to
exclude zero.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from diva_jax.evals import seeds, stats
from diva_jax.evals.results import words
from diva_jax.world import arms
from diva_jax.world.endpoints import CALIBRATED, DRIFT, ENDPOINTS, NAMES, SEEN

_RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference in percentage points; `seeds` is None where fewer than two seeds differ."""

    value: float
    items: tuple[float, float]
    seeds: tuple[float, float] | None

    @property
    def sign(self) -> int:
        """1 or -1 where both intervals exclude zero, otherwise 0."""
        if self.seeds is None:
            return 0
        low, high = (f(a, b) for f, a, b in zip((min, max), self.items, self.seeds, strict=True))
        return (low > 0) - (high < 0)

    def __str__(self) -> str:
        text = f"{self.value:+.1f} [{self.items[0]:+.1f}, {self.items[1]:+.1f}]"
        return text + (f" seeds [{self.seeds[0]:+.1f}, {self.seeds[1]:+.1f}]" if self.seeds else "")


@dataclasses.dataclass(frozen=True)
class Compared:
    """The comparison of one arm; dicts are by endpoint.

    Attributes:
      scores: means over seeds, percent, and the drift.
      each: the score of every seed.
      untuned, control: differences to the untuned encoder and to the arm's control; empty where there is none.
    """

    seeds: int
    scores: Mapping[str, float]
    each: Mapping[str, Sequence[float]]
    untuned: Mapping[str, Difference]
    control: Mapping[str, Difference]


def found(row: Mapping) -> dict[str, np.ndarray]:
    """The tests of a row of results.jsonl, as `blindness.measure` returned them."""
    return {name: np.frombuffer(a.encode(), np.uint8).astype(np.float64) - ord("0") for name, a in row["items"].items()}


def difference(before: Sequence[Mapping], after: Sequence[Mapping], endpoint: str) -> Difference:
    """The difference of two arms' runs; a single run of `before` (the untuned encoder) stands for every seed."""
    e = ENDPOINTS[endpoint]
    strata = e.items(found(after[0]))[1]
    first, second = (np.stack([e.items(found(row))[0] for row in rows]) for rows in (before, after))
    paired = stats.paired(first.mean(axis=0), second.mean(axis=0), resamples=_RESAMPLES, seed=0, strata=strata)
    interval = None
    if len(first) == 1:
        first = np.repeat(first, len(second), axis=0)
    if (n := min(len(first), len(second))) > 1:
        each = [100 * stats.mean(b - a, strata) for a, b in zip(first[:n], second[:n], strict=True)]
        interval = seeds.student(each)
    return Difference(paired["difference"], tuple(paired["interval"]), interval and tuple(interval))


def compare(rows: Sequence[Mapping], early: bool = False) -> dict[str, Compared]:
    """Arm -> its comparison at the end of the runs, or `early`, in the order of `arms.ARMS`; arms with changed fields
    come last."""
    at = "early" if early else "images"
    rows = [r for r in rows if r["after"] == r[at] or r["arm"] == "untuned"]
    names = list(dict.fromkeys([*arms.ARMS, *(row["arm"] for row in rows)]))
    by_arm = {arm: sorted((r for r in rows if r["arm"] == arm), key=lambda r: r["seed"]) for arm in names}
    untuned, out = by_arm["untuned"], {}
    for arm, runs in by_arm.items():
        if not runs:
            continue
        control = by_arm.get(arms.find(arm).control, [])
        each = {name: [e.score(found(r)) for r in runs] for name, e in ENDPOINTS.items()}
        each[DRIFT] = [r[DRIFT] for r in runs]
        out[arm] = Compared(
            len(runs),
            {name: float(np.mean(values)) for name, values in each.items()},
            each,
            {e: difference(untuned, runs, e) for e in ENDPOINTS} if untuned and arm != "untuned" else {},
            {e: difference(control, runs, e) for e in ENDPOINTS} if control else {},
        )
    return out


def says(against: Mapping[str, Difference]) -> str:
    """The words of `evals.results` on the absent facts."""
    return words(against[CALIBRATED].sign, against[SEEN].sign)


def verdict(arm: str, c: Compared) -> str:
    """Whether the arm sees more of the absent facts than the untuned encoder and its control, and what it costs."""
    if not c.untuned:
        return "the reference"
    if c.seeds < 2:
        return "one seed: nothing can be claimed"
    text = says(c.untuned)
    if c.control:
        text += f"; than its control: {says(c.control)}"
    elif arms.find(arm).control:
        text += "; its control was not run"
    names = c.untuned[NAMES].sign
    return text + {1: "; names better", 0: "", -1: f"; names {c.untuned[NAMES].value:.1f}"}[names]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def markdown(compared: Mapping[str, Compared]) -> str:
    """Tables: scores, then differences to the untuned encoder and to the control."""
    titles = [e.title for e in ENDPOINTS.values()]
    rows = [
        [
            f"`{arm}`",
            str(c.seeds),
            *(f"{c.scores[e]:.1f}" for e in ENDPOINTS),
            f"{c.scores[DRIFT]:.3f}",
            verdict(arm, c),
        ]
        for arm, c in compared.items()
    ]
    lines = _table(["arm", "seeds", *titles, "drift, 1 - cosine", "verdict"], rows)
    for title, which in (("the untuned encoder", "untuned"), ("the control", "control")):
        rows = [
            [f"`{arm}`", *(str(getattr(c, which)[e]) for e in ENDPOINTS)]
            for arm, c in compared.items()
            if getattr(c, which)
        ]
        lines += ["", f"Difference to {title}, points [95% interval over items] seeds [over seeds]:", ""]
        lines += _table(["arm", *titles], rows)
    return "\n".join(lines) + "\n"


def scores(compared: Mapping[str, Compared]) -> dict[str, dict[str, list[float]]]:
    """Arm -> endpoint -> the score of every seed, for JSON."""
    return {arm: {e: [round(x, 4) for x in values] for e, values in c.each.items()} for arm, c in compared.items()}


def write_pareto(compared: Mapping[str, Compared], path: Path) -> None:
    """Writes a figure of what is seen (matches on absent facts) against what is kept (names), a labelled dot per arm.

    Controls are grey; bars are 95% intervals over seeds of the differences to the untuned encoder.
    """
    # Imported here, because matplotlib is slow to import.
    from matplotlib.figure import Figure

    from diva_jax.report.figures import COLOURS, colour_role

    figure = Figure(figsize=(7.2, 4.6))
    axes = figure.add_axes((0.09, 0.12, 0.72, 0.84))
    number, dots = 0, []
    for arm, c in compared.items():
        is_control = arm.endswith("_control")
        colour = "0.65" if is_control else COLOURS[colour_role(number)][0]
        number += not is_control
        x, y = c.scores[NAMES], c.scores[SEEN]
        bars = {}
        for axis, endpoint in (("xerr", NAMES), ("yerr", SEEN)):
            ends = c.untuned[endpoint].seeds if c.untuned else None
            if ends:
                bars[axis] = (ends[1] - ends[0]) / 2
        axes.errorbar(x, y, fmt="o", markersize=4, color=colour, capsize=2, linewidth=1, **bars)
        dots.append((y, x, arm, colour))
    gap = 0.035 * np.ptp(axes.get_ylim())
    for column, names_kept in ((26, False), (105, True)):  # Labels stand in two columns, none over another.
        below = -np.inf
        for y, x, arm, colour in sorted(dot for dot in dots if (dot[1] > 50) == names_kept):
            below = max(y, below + gap)
            line = dict(arrowstyle="-", color=colour, linewidth=0.5)
            axes.annotate(arm, (x, y), (column, below), fontsize=8, color=colour, va="center", arrowprops=line)
    axes.set(xlabel="names right, %", ylabel="matches on absent facts, %")
    axes.axhline(50, color=COLOURS["grid"][0], linewidth=1)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=200, metadata={"Software": None})
