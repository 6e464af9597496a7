"""Paired statistics over the runs of an experiment, as a table in Markdown and as a figure.

A difference is between the means over seeds of two arms on the same items. It has two intervals: over items (bootstrap,
drawn within each pattern or fact) and over seeds (Student's t, of the differences seed by seed). A claim needs both to
exclude zero.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from diva_jax.evals import stats
from diva_jax.world.arms import ARMS
from diva_jax.world.scenes import FACTS

METRICS = {
    "pairs": "pairs",
    "matches": "matches",
    "zeroshot": "names",
    "linear": "linear probes",
    "knn": "nearest neighbours",
}
_RESAMPLES = 4000


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference in percentage points; `seeds` is None with fewer than two seeds."""

    value: float
    items: tuple[float, float]
    seeds: tuple[float, float] | None

    @property
    def sign(self) -> int:
        """1 or -1 where both intervals exclude zero, otherwise 0."""
        if self.seeds is None:
            return 0
        low, high = (f(a, b) for f, a, b in zip((min, max), self.items, self.seeds, strict=True))
        return 1 if low > 0 else -1 if high < 0 else 0

    def __str__(self) -> str:
        text = f"{self.value:+.1f} [{self.items[0]:+.1f}, {self.items[1]:+.1f}]"
        return text + (f" seeds [{self.seeds[0]:+.1f}, {self.seeds[1]:+.1f}]" if self.seeds else "")


@dataclasses.dataclass(frozen=True)
class Compared:
    """The comparison of one arm; dicts are by metric.

    Attributes:
      scores: means over seeds, percent; by pattern too ("pairs/FACT").
      untuned, control: differences to the untuned encoder and to the arm's control; empty where there is none.
    """

    seeds: int
    scores: Mapping[str, float]
    untuned: Mapping[str, Difference]
    control: Mapping[str, Difference]


def _items(row: Mapping, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(0 or 1 per item, the stratum of each) of a metric of one run."""
    if metric in ("pairs", "matches"):
        hits = row["items"][metric]
        return _digits(hits), np.arange(len(hits)) * len(FACTS) // len(hits)
    if metric == "zeroshot":
        return _digits(row["items"]["zeroshot"]), np.zeros(len(row["items"]["zeroshot"]), int)
    parts = [_digits(a) for name, a in sorted(row["items"].items()) if name.startswith(f"{metric}/")]
    return np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(p) for p in parts])


def _digits(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.float64) - ord("0")


def difference(before: Sequence[Mapping], after: Sequence[Mapping], metric: str) -> Difference:
    """The difference of two arms' runs; a single run of `before` (the untuned encoder) stands for every seed."""
    strata = _items(after[0], metric)[1]
    first, second = (np.stack([_items(row, metric)[0] for row in rows]) for rows in (before, after))
    found = stats.paired(first.mean(axis=0), second.mean(axis=0), resamples=_RESAMPLES, seed=0, strata=strata)
    interval = None
    if len(first) == 1:
        first = np.repeat(first, len(second), axis=0)
    if (n := min(len(first), len(second))) > 1:
        each = [100 * stats.mean(b - a, strata) for a, b in zip(first[:n], second[:n], strict=True)]
        half = student.ppf(0.975, n - 1) * np.std(each, ddof=1) / n**0.5
        interval = (float(np.mean(each) - half), float(np.mean(each) + half))
    return Difference(found["difference"], tuple(found["interval"]), interval)


def compare(rows: Sequence[Mapping]) -> dict[str, Compared]:
    """Arm -> its comparison, in the order of `ARMS`, in the metrics that all runs have: older ones lack matches."""
    metrics = [m for m in METRICS if all(m in row["scores"] for row in rows)]
    by_arm = {arm: sorted((r for r in rows if r["arm"] == arm), key=lambda r: r["seed"]) for arm in ARMS}
    untuned, out = by_arm["untuned"], {}
    for arm, runs in by_arm.items():
        if not runs:
            continue
        control = by_arm.get(ARMS[arm].control, [])
        out[arm] = Compared(
            len(runs),
            {m: float(np.mean([r["scores"][m] for r in runs])) for m in runs[0]["scores"]},
            {m: difference(untuned, runs, m) for m in metrics} if untuned and arm != "untuned" else {},
            {m: difference(control, runs, m) for m in metrics} if control else {},
        )
    return out


def verdict(arm: str, found: Compared) -> str:
    """One sentence: whether the arm sees more than the untuned encoder, and than its control."""
    if not found.untuned:
        return "the reference"
    to_untuned, kept = found.untuned["pairs"].sign, found.untuned["zeroshot"].sign
    words = {1: "more pairs than untuned", 0: "no clear difference in pairs to untuned", -1: "fewer pairs than untuned"}
    matches = found.untuned["matches"].sign if "matches" in found.untuned else 0
    text = words[to_untuned] + {1: ", more matches", 0: "", -1: ", fewer matches"}[matches]
    text += {1: ", names better", 0: "", -1: ", names worse"}[kept]
    if ARMS[arm].control and found.control:
        beats = found.control["pairs"].sign
        text += {1: "; above its control", 0: "; not above its control", -1: "; below its control"}[beats]
    elif ARMS[arm].control:
        text += "; its control was not run, so nothing can be claimed"
    return text


def markdown(compared: Mapping[str, Compared]) -> str:
    """Tables: scores, differences to the untuned encoder and to the control, and pairs by fact."""
    shown = {m: title for m, title in METRICS.items() if all(m in c.scores for c in compared.values())}
    lines = [
        "| arm | seeds | " + " | ".join(shown.values()) + " | verdict |",
        "|---|---|" + "---|" * (len(shown) + 1),
    ]
    for arm, c in compared.items():
        scores = " | ".join(f"{c.scores[m]:.1f}" for m in shown)
        lines.append(f"| `{arm}`: {ARMS[arm].what} | {c.seeds} | {scores} | {verdict(arm, c)} |")
    for title, which in (("the untuned encoder", "untuned"), ("the control", "control")):
        lines += ["", f"Difference to {title}, points [95% interval over items] seeds [over seeds]:", ""]
        lines += ["| arm | " + " | ".join(shown.values()) + " |", "|---|" + "---|" * len(shown)]
        for arm, c in compared.items():
            if found := getattr(c, which):
                lines.append(f"| `{arm}` | " + " | ".join(str(found[m]) for m in shown) + " |")
    lines += ["", "Pairs by fact, percent:", "", "| arm | " + " | ".join(FACTS) + " |", "|---|" + "---|" * len(FACTS)]
    for arm, c in compared.items():
        lines.append(f"| `{arm}` | " + " | ".join(f"{c.scores[f'pairs/{f}']:.0f}" for f in FACTS) + " |")
    return "\n".join(lines) + "\n"


def write_pareto(compared: Mapping[str, Compared], path: Path) -> None:
    """Writes a figure of pairs (what is seen) against names of objects (what is kept), one dot per arm."""
    # Imported here, because matplotlib is slow to import.
    from matplotlib.figure import Figure

    from diva_jax.report.figures import COLOURS, colour_role

    figure = Figure(figsize=(7.2, 4.2))
    axes = figure.add_axes((0.08, 0.12, 0.7, 0.82))
    for number, (arm, c) in enumerate(compared.items()):
        colour, _ = COLOURS[colour_role(number)]
        axes.plot(c.scores["zeroshot"], c.scores["pairs"], "o", color=colour, label=arm, clip_on=False)
    axes.set(xlabel="names right, %", ylabel="pairs right, %")
    axes.grid(axis="y", color=COLOURS["grid"][0])
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="upper right", frameon=False)
    figure.savefig(path, dpi=200, metadata={"Software": None})
