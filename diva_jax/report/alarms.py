"""What is wrong or in doubt in an evaluation or a run: the strip at the top of the page."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from diva_jax.common.results_schema import Results, Task
from diva_jax.report import wording
from diva_jax.report.inputs import Inputs, Run

# These two bounds are conventions: the effective rank of ImageNet images under CLIP encoders is in the hundreds, and
# tuning moves it by a few percent; half of it lost, or half of the embedding's length turned away, is no fine-tuning.
MIN_SHARE_OF_EFFECTIVE_RANK = 0.5
MIN_COSINE_TO_ORIGINAL = 0.5
# Metrics of the feedback whose expectation is zero where it is noise.
_NOISE_METRICS = ("gap_other", "gradient_cosine")
_MAX_NAMED_METRICS = 4


class Alarm(NamedTuple):
    """One line of the strip; `kind` is "bad", or "doubt" where the data do not show an effect."""

    title: str
    text: str
    kind: str


def _collapse(before: float | None, after: float | None, cosine: float | None, who: str) -> Iterator[Alarm]:
    if before and after is not None and after < MIN_SHARE_OF_EFFECTIVE_RANK * before:
        figures = f"the effective rank fell from {wording.compact(before)} to {wording.compact(after)}"
        yield Alarm(
            "Representation collapsed",
            f"{who}: {figures}. Different images have nearly the same embedding, so other scores of these weights "
            "must not be read as improvements.",
            "bad",
        )
    if cosine is not None and cosine < MIN_COSINE_TO_ORIGINAL:
        yield Alarm(
            "Representation replaced",
            f"{who}: the mean cosine to the original embedding is {wording.compact(cosine)}. What was built on the "
            "original encoder (its text tower, probes, MLLMs) does not fit these weights.",
            "bad",
        )


def _drift(task: Task) -> Iterator[tuple[str, Alarm]]:
    """Returns (label of the weights, alarm) of each comparison."""
    for c in task.comparisons:
        ranks = [task.weights[label].scores.get("effective_rank") for label in (c.before, c.after)]
        before, after = (rank.score if rank else None for rank in ranks)
        cosine = getattr(c.scores.get("cosine"), "score", None)
        yield from ((c.after, alarm) for alarm in _collapse(before, after, cosine, c.after))


def doubted(inputs: Inputs) -> set[str]:
    """Returns the labels of weights whose representation has collapsed or been replaced, here or in their run."""
    tasks = inputs.results.tasks.values() if inputs.results else ()
    labels = {label for task in tasks for label, _ in _drift(task)}
    return labels.union(*(run.labels for run in inputs.runs if any(_run_drift(run))))


def _noise(label: str, intervals: Mapping[str, list[float] | None], kind: str = "bad") -> Iterator[Alarm]:
    """The alarm for intervals of the feedback's metrics that are not above zero."""
    empty = [
        f"{metric} ({wording.interval(ends, '', wording.places(ends, ''))})"
        for metric, ends in intervals.items()
        if ends and ends[0] <= 0
    ]
    if empty:
        yield Alarm(
            "Feedback is noise",
            f"{label}: the interval of {' and of '.join(empty)} is not above zero: these data show no signal about the "
            "image in what the encoder is tuned with.",
            kind,
        )


def _comparisons(results: Results) -> Iterator[Alarm]:
    """Differences for the worse in any metric, and main metrics without a difference, per comparison."""
    found: dict[tuple[bool, str, bool], list[str]] = {}
    for task in results.tasks.values():
        for c in task.comparisons:
            differences, of = c.differences(), (c.after, c.before in task.controls)
            for i, (metric, info) in enumerate(task.metrics.items()):
                if d := differences.get(metric):
                    kind, name = wording.direction(d, info.direction), f"{task.title}, {info.title}"
                    if kind.endswith("lost"):
                        figure = wording.signed(d.difference, info.unit, wording.places(d.known_interval, info.unit))
                        found.setdefault((True, *of), []).append(f"{name} ({figure})")
                    elif kind == "zero" and i == 0:
                        found.setdefault((False, *of), []).append(name)
    for (worse, label, control), names in sorted(found.items(), key=lambda item: not item[0][0]):
        more = f" and {len(names) - _MAX_NAMED_METRICS} more" if len(names) > _MAX_NAMED_METRICS else ""
        listed = ", ".join(names[:_MAX_NAMED_METRICS]) + more
        if worse:
            yield Alarm(f"Worse than {'the control' if control else 'before'}", f"{label}: {listed}.", "bad")
        else:
            says = f"{label}{' against the control' * control}: {listed}"
            yield Alarm("No difference shown", f"{says}: zero is within the interval of the difference.", "doubt")


def _run_drift(run: Run) -> Iterator[Alarm]:
    """The drift at the last evaluation of a run in training."""
    rank, change = run.last("eval/drift/effective_rank"), run.last("eval/drift/effective_rank_change")
    before = rank - change if rank is not None and change is not None else None
    yield from _collapse(before, rank, run.last("eval/drift/cosine"), f"run {run.name}, last evaluation")


def of(inputs: Inputs) -> list[Alarm]:
    """Returns everything that is wrong or in doubt, the worst first."""
    alarms: list[Alarm] = []
    if inputs.results:
        for task in inputs.results.tasks.values():
            alarms += [alarm for _, alarm in _drift(task)]
            for i, (label, weights) in enumerate(task.weights.items()):
                scores = {m: weights.scores[m] for m in _NOISE_METRICS if m in weights.scores}
                # Weights from before the tuning can still be tuned well, as the projection is trained too.
                kind = "doubt" if i == 0 and len(task.weights) > 1 else "bad"
                alarms += _noise(label, {m: s.known_interval for m, s in scores.items()}, kind)
        alarms += _comparisons(inputs.results)
        alarms += [Alarm("Several checkpoints of one run", f"{note}.", "doubt") for note in inputs.results.notes]
    for run in inputs.runs:
        ends = {m: [run.last(f"feedback/{m}/{end}") for end in ("low", "high")] for m in _NOISE_METRICS}
        known = {m: e for m, e in ends.items() if None not in e and e[0] < e[1]}
        alarms += [*_run_drift(run), *_noise(f"run {run.name}, last evaluation", known)]
    return sorted(alarms, key=lambda alarm: alarm.kind != "bad")
