"""What is wrong or in doubt in an evaluation or a run: the strip at the top of the page."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from diva_jax.report import wording
from diva_jax.report.inputs import Inputs, Run

# Conventions: the effective rank of ImageNet images under CLIP encoders is in the hundreds, and tuning moves it by a
# few percent; half of it lost, or half of the embedding's length turned away, is no fine-tuning any more.
COLLAPSED = 0.5  # Share of the effective rank that is left.
TURNED = 0.5  # Mean cosine to the original embedding.
_SIGNAL = ("gap_other", "gradient_cosine")  # Metrics of the feedback whose expectation is zero where it is noise.
_NAMED = 4  # Metrics that an alarm names; others are counted.


class Alarm(NamedTuple):
    """One line of the strip.

    Attributes:
      title: a few words.
      text: figures, and what they mean.
      kind: "bad", or "doubt" where the data do not show an effect.
    """

    title: str
    text: str
    kind: str


def _collapse(before: float | None, after: float | None, cosine: float | None, who: str) -> Iterator[Alarm]:
    if before and after is not None and after < COLLAPSED * before:
        figures = f"the effective rank fell from {wording.compact(before)} to {wording.compact(after)}"
        yield Alarm(
            "Representation collapsed",
            f"{who}: {figures}. Different images have nearly the same embedding, so other scores of these weights "
            "must not be read as improvements.",
            "bad",
        )
    if cosine is not None and cosine < TURNED:
        yield Alarm(
            "Representation replaced",
            f"{who}: the mean cosine to the original embedding is {wording.compact(cosine)}. What was built on the "
            "original encoder (its text tower, probes, MLLMs) does not fit these weights.",
            "bad",
        )


def _drift(task: Mapping[str, Any]) -> Iterator[tuple[str, Alarm]]:
    """Returns (label of the weights, alarm) of each comparison."""
    for c in task.get("comparisons", []):
        ranks = [task["weights"][c[w]]["scores"].get("effective_rank", {}).get("score") for w in ("before", "after")]
        cosine = c["scores"].get("cosine", {}).get("score")
        yield from ((c["after"], alarm) for alarm in _collapse(*ranks, cosine, c["after"]))


def doubted(inputs: Inputs) -> set[str]:
    """Returns the labels of weights whose representation has collapsed or been replaced, here or in their run."""
    tasks = inputs.results["tasks"].values() if inputs.results else ()
    found = {label for task in tasks for label, _ in _drift(task)}
    return found.union(*(run.labels for run in inputs.runs if any(_run_drift(run))))


def _noise(label: str, found: Mapping[str, list[float] | None], kind: str = "bad") -> Iterator[Alarm]:
    """`found` is the interval of each of the feedback's metrics."""
    empty = [
        f"{m} ({wording.interval(ends, '', wording.places(ends, ''))})"
        for m, ends in found.items()
        if ends and ends[0] <= 0
    ]
    if empty:
        yield Alarm(
            "Feedback is noise",
            f"{label}: the interval of {' and of '.join(empty)} is not above zero: these data show no signal about the "
            "image in what the encoder is tuned with.",
            kind,
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _comparisons(results: Mapping[str, Any]) -> Iterator[Alarm]:
    """Differences for the worse in any metric, and main metrics without a difference, per set of weights."""
    worse: dict[str, list[str]] = {}
    none: dict[str, list[str]] = {}
    for task in results["tasks"].values():
        for c in task.get("comparisons", []):
            for i, (metric, info) in enumerate(task["metrics"].items()):
                d = c["scores"].get(metric, {})
                kind = wording.direction(d, wording.better(info)) if "difference" in d else ""
                name = f"{task['title']}, {info['title']}"
                if kind.endswith("lost"):
                    figure = wording.signed(d["difference"], info["unit"], wording.places(d["interval"], info["unit"]))
                    worse.setdefault(c["after"], []).append(f"{name} ({figure})")
                elif kind == "zero" and i == 0:
                    none.setdefault(c["after"], []).append(name)
    for label, names in worse.items():
        yield Alarm("Worse than before", f"{label}: {_listed(names)}.", "bad")
    for label, names in none.items():
        yield Alarm(
            "No difference shown", f"{label}: {_listed(names)}: zero is within the interval of the difference.", "doubt"
        )


def _last(run: Run, key: str) -> float | None:
    return run.curve(key)[-1][1] if run.curve(key) else None


def _run_drift(run: Run) -> Iterator[Alarm]:
    """The drift at the last evaluation of a run in training."""
    rank, change = _last(run, "eval/drift/effective_rank"), _last(run, "eval/drift/effective_rank_change")
    before = rank - change if rank is not None and change is not None else None
    yield from _collapse(before, rank, _last(run, "eval/drift/cosine"), f"run {run.name}, last evaluation")


def _run_noise(run: Run) -> Iterator[Alarm]:
    ends = {m: [_last(run, f"feedback/{m}/{end}") for end in ("low", "high")] for m in _SIGNAL}
    known = {m: e for m, e in ends.items() if None not in e and e[0] < e[1]}
    yield from _noise(f"run {run.name}, last evaluation", known)


def of(inputs: Inputs) -> list[Alarm]:
    """Returns everything that is wrong or in doubt, the worst first."""
    found: list[Alarm] = []
    if results := inputs.results:
        for task in results["tasks"].values():
            found += [alarm for _, alarm in _drift(task)]
            for i, (label, weights) in enumerate(task["weights"].items()):
                ends = {m: weights["scores"].get(m, {}).get("interval") for m in _SIGNAL}
                # Weights from before the tuning can still be tuned well, as the projection is trained too.
                found += _noise(label, ends, "doubt" if i == 0 and len(task["weights"]) > 1 else "bad")
        found += _comparisons(results)
    for run in inputs.runs:
        found += [*_run_drift(run), *_run_noise(run)]
    return sorted(found, key=lambda a: a.kind != "bad")
