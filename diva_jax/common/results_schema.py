"""The form of results.json: `diva_jax.evals` writes it, the report and the model card read it. Fields that are not
declared here may have any value and are ignored. docs/EVALUATION.md has an example."""

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from diva_jax.common.errors import brief
from diva_jax.common.json_files import Record

SCHEMA = 1
# Multiples of a number, such as the limits of a chart's axis, must be finite too.
LARGEST_NUMBER = 1e100

Number = Annotated[float, Field(gt=-LARGEST_NUMBER, lt=LARGEST_NUMBER, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Interval = Annotated[list[Number], Field(min_length=2, max_length=2)]


class _WithInterval(Record):
    """A number with its 95% interval over items and, for a group of runs, that of each run and Student's over runs."""

    interval: Interval | None = None
    runs: list[Number] = []
    runs_interval: Interval | None = None

    @property
    def value(self) -> float:
        """The score or difference itself."""
        return self.difference if isinstance(self, Difference) else self.score

    @property
    def all_agree(self) -> bool:
        """Whether the interval is a single point: where all items agree, every resample is the same."""
        return self.interval is not None and self.interval[0] == self.interval[1]

    @property
    def known_interval(self) -> Interval | None:
        """The interval, or None where it is a single point, which says nothing about other items."""
        return None if self.all_agree else self.interval


class Score(_WithInterval):
    """A score of one set of weights, or one that is defined between two, with its 95% interval; `seeds` are those of
    each random draw, and `seeds_std` their standard deviation, where the score is a mean of draws."""

    score: Number
    seeds: list[Number] = []
    seeds_std: Number | None = None


class McNemar(Record):
    """The exact two-sided test on the items that one set of weights has right and the other has not."""

    won: Count
    lost: Count
    p: Number


class Difference(_WithInterval):
    """The paired difference of a score between two sets of weights, with its 95% interval."""

    difference: Number
    mcnemar: McNemar | None = None

    @property
    def sign(self) -> int:
        """1 where zero is below the interval over items and, with runs, the one over runs; -1 above both; else 0, also
        where McNemar's test has p >= 0.05. With that test a single point counts as an interval over items too."""
        intervals = [self.interval, self.runs_interval] if self.runs or self.runs_interval else [self.interval]
        wide = all(ends and ends[0] < ends[1] for ends in intervals[bool(self.all_agree and self.mcnemar) :])
        if not wide or (self.mcnemar and self.mcnemar.p >= 0.05):
            return 0
        if all(low > 0 for low, _ in intervals):
            return 1
        return -1 if all(high < 0 for _, high in intervals) else 0


def _kind(value: Any) -> str:
    is_difference = "difference" in value if isinstance(value, dict) else isinstance(value, Difference)
    return "difference" if is_difference else "score"


Compared = Annotated[Annotated[Difference, Tag("difference")] | Annotated[Score, Tag("score")], Discriminator(_kind)]


class Metric(Record):
    """What a score is; `better` is "higher", "lower", or "" where neither is. Where images and texts meet, `answers` is
    "image", "text", "group" or "match", and `readout` or `dataset` is what the scores of each of these belong to."""

    title: str
    unit: str
    better: str | None = None
    answers: str = ""
    readout: str = ""
    dataset: str = ""

    @property
    def direction(self) -> str:
        """`better`, or what it was before it was written: percentages are better where they are higher."""
        if self.better is not None:
            return self.better
        return "higher" if self.unit == "%" else ""


class Pattern(Record):
    name: str
    scores: dict[str, Score]


class TimestepBin(Record):
    low: Number
    high: Number
    scores: dict[str, Score]


class SegmentationClass(Record):
    name: str
    iou: Number | None = None


class SegmentedImage(Record):
    """An image file, and maps of its true and predicted classes as PNG files in base64."""

    image: str
    truth: str
    predicted: str


class Weights(Record):
    """What a task reports on one set of weights: `scores` by metric, those of parts of the data, the number of
    `classes` or a record for each, `pictures` whose classes a segmentation shows, `notes` for the reader."""

    scores: dict[str, Score]
    patterns: list[Pattern] = []
    timesteps: list[TimestepBin] = []
    classes: Count | list[SegmentationClass] | None = None
    pictures: list[SegmentedImage] = []
    notes: list[str] = []


class Flip(Record):
    """An item that is right under one of two sets of weights only; `won`: after, and not before. `before` and `after`
    are the probability of image 1 under each text, empty for items that are no pairs."""

    metric: str
    won: bool
    item: Any = ""
    group: str | None = None
    images: list[str] = []
    texts: list[str] = []
    before: list[Number] = []
    after: list[Number] = []


class Comparison(Record):
    before: str
    after: str
    scores: dict[str, Compared]
    flipped: list[Flip] = []

    def differences(self) -> dict[str, Difference]:
        """The scores that are differences, by metric."""
        return {m: s for m, s in self.scores.items() if isinstance(s, Difference)}


class Task(Record):
    """A task's scores for each set of weights, by label, and their comparisons."""

    title: str
    metrics: dict[str, Metric]
    weights: dict[str, Weights]
    data: str | None = None
    count: Count | None = None
    items: str = "items"
    comparisons: list[Comparison] = []

    @property
    def controls(self) -> set[str]:
        """The labels of controls: weights, not the first, that others are compared with."""
        return {c.before for c in self.comparisons} - {next(iter(self.weights), "")}

    @model_validator(mode="after")
    def _names_are_known(self):
        used = [(metric, "metrics") for w in self.weights.values() for metric in w.scores]
        for c in self.comparisons:
            used += [(c.before, "weights"), (c.after, "weights"), *((metric, "metrics") for metric in c.scores)]
        for name, where in used:
            if name not in getattr(self, where):
                raise ValueError(f"{brief(name)} is used, which is not one of its {where}")
        for c in self.comparisons:
            for metric in c.differences():
                if not all(metric in self.weights[side].scores for side in (c.before, c.after)):
                    raise ValueError(f"{brief(metric)} is compared, which has no scores")
        return self


class Source(Record):
    """A set of weights: label, source, and of a run its checkpoint's step and SHA-256; or the runs of a group."""

    label: str = ""
    source: str | None = None
    step: Count | None = None
    checkpoint: str = ""
    members: list["Source"] = []

    @property
    def place(self) -> str:
        """Such as `runs/a, step 400`."""
        return f"{self.source}" if self.step is None else f"{self.source}, step {self.step}"


class Verdict(Record):
    """The verdict on the metrics `pairs` and `matches` of a task."""

    task: str
    pairs: str
    matches: str
    says: str


class Summary(Record):
    """A comparison in words: the first verdict, the figures, what it cost, and what was not measured. `before` and
    `after` are labels of weights, `control` is whether `before` is one."""

    before: str
    after: str
    says: str
    detail: str
    control: bool = False
    verdicts: list[Verdict] = []
    not_measured: list[str] = []

    @property
    def what(self) -> str:
        return f"{self.after} against {'the control ' * self.control}{self.before}"


class Results(Record):
    """The content of results.json; the first of `weights` is the reference of comparisons."""

    tasks: Annotated[dict[str, Task], Field(min_length=1)]
    weights: Annotated[list[Source], Field(min_length=1)]
    summary: list[Summary] = []
    notes: list[str] = []
    created: str = ""
    seconds: Number | None = None
    devices: str = ""
    versions: dict[str, Any] = {}
    config: dict[str, Any] | None = None
    options: dict[str, Any] | None = None

    @property
    def labels(self) -> list[str]:
        return [w.label for w in self.weights]

    @model_validator(mode="after")
    def _labels_are_known(self):
        for name, task in self.tasks.items():
            if strange := [label for label in task.weights if label not in self.labels]:
                raise ValueError(f"{brief(name, 60)} has scores of {brief(strange[0])}, which is no set of weights")
        for verdict in (v for s in self.summary for v in s.verdicts):
            task = self.tasks.get(verdict.task)
            if not task or not {verdict.pairs, verdict.matches} <= task.metrics.keys():
                raise ValueError(f"summary has a verdict on {brief(verdict.matches)}, which is not among the tasks")
        return self
