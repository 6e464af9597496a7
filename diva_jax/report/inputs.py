"""Reads what a report is made of, which may come from elsewhere: results.json of an evaluation, metrics.jsonl and
config.json of a run. Every value that is shown has its declared type, through `common.json_files`."""

import contextlib
import shlex
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from diva_jax.common import config_files, json_files, paths
from diva_jax.common.errors import UserError
from diva_jax.common.fields import finite
from diva_jax.common.results_schema import LARGEST_NUMBER, SCHEMA, Metric, Results, Source, Task


class Session(json_files.Record):
    """When and where a run was started or resumed, an entry of sessions.json."""

    started: str = ""
    devices: str = ""
    versions: dict[str, Any] = {}


class CaptionedImage(json_files.Record):
    image: str
    caption: str


class ImageRows(json_files.Record):
    """The content of images.json: a section of images beside each other, with their captions."""

    title: str
    note: str
    rows: list[list[CaptionedImage]]


class Run(NamedTuple):
    """A training run: the name of the workdir, the index of its colour (that of the first weights of this run, if an
    evaluation has some), the labels of these weights, config.json, the rows of metrics.jsonl by step, and when and
    where it ran (see `training.metrics.Writer`)."""

    name: str
    index: int
    labels: tuple[str, ...]
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    sessions: list[Session]

    @property
    def stages(self) -> list[tuple[str, int]]:
        """(name, steps until its end) of each stage; of an objective of the user's own, if known, one of all steps."""
        from diva_jax import objectives  # Here, because jax is slow to import.

        name, steps = str(self.config.get("objective")), self.config.get("steps")
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError, OverflowError, UserError):
            if "." not in name or config_files.is_own(name):
                return [(stage.name, int(stage.end)) for stage in objectives.stages(ConfigDict(self.config))]
        return [(name, int(steps))] if finite(steps) else []

    @property
    def total(self) -> int | None:
        """Number of steps of the whole run, or None if the config does not contain it."""
        return self.stages[-1][1] if self.stages else None

    def curve(self, key: str) -> list[tuple[float, float]]:
        """Returns [(step, value)] of one key, finite values only."""
        found = [(row["step"], float(row[key])) for row in self.rows if finite(row.get(key))]
        return [(step, value) for step, value in found if abs(value) < LARGEST_NUMBER]  # Charts can show no larger one.

    def last(self, key: str) -> float | None:
        """Returns the last finite value of one key."""
        return self.curve(key)[-1][1] if self.curve(key) else None

    def seconds(self) -> float | None:
        """Returns the time of the run up to its last row, summed over its sessions [s]; None if it was not logged."""
        if not (clock := [v for _, v in self.curve("seconds")]):
            return None
        # Each session counts from zero.
        return sum(a for a, b in zip(clock, [*clock[1:], -1.0], strict=True) if b < a)


class Inputs(NamedTuple):
    """The content of a report in `folder`: results.json, if any, in which readouts of a task that are the same are one
    metric; the training runs; and images.json, if any."""

    folder: epath.Path
    results: Results | None
    runs: list[Run]
    image_rows: ImageRows | None = None
    missing: tuple[str, ...] = ()


def read(folder: epath.PathLike) -> Inputs:
    """Reads an evaluation's output folder, a workdir, or one that is both, and the workdirs that an evaluation's
    weights came from, where they exist. A UserError names the file and line that is invalid."""
    folder = paths.folder(folder, "DIR")
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give an evaluation's --out folder or a training --workdir")
    results = _results(folder / "results.json")
    workdirs: dict[epath.Path, tuple[int, tuple[str, ...]]] = {paths.absolute(folder): (1, ())}
    missing: dict[str, None] = {}
    for i, weights in enumerate(results.weights if results else ()):
        for place in (weights, *weights.members):
            if place.step is None or not place.source:
                continue
            if source := _workdir(place, paths.is_remote(folder)):
                index, labels = workdirs.get(source, (i, ()))
                workdirs[source] = index, (*labels, weights.label)
            elif not paths.is_remote(place.source):
                missing[place.source] = None
    runs, repair = [], "restore or remove it"
    for path, place in workdirs.items():
        config = json_files.read(path / "config.json", dict[str, Any], repair, {})
        sessions = json_files.read(path / "sessions.json", list[Session], repair, [])
        if rows := _metrics(path / "metrics.jsonl"):
            runs.append(Run(path.name, *place, config, rows, sessions))
    if results is None and not runs:
        problem = f"{folder} has neither results.json nor logged steps in metrics.jsonl"
        command = f"python -m diva_jax.evaluate --out={shlex.quote(str(folder))}"
        raise UserError(f"{problem}: give an evaluation's output folder ({command}) or a training workdir")
    image_rows = json_files.read(folder / "images.json", ImageRows, "write it again, or remove it", None)
    return Inputs(folder, results, runs, image_rows, tuple(missing))


def _workdir(place: Source, remote: bool) -> epath.Path | None:
    """The workdir of the run that was evaluated, or None: it has the same checkpoint (any of this step, where that is
    not recorded) or, where it is deleted, has got so far; one in a bucket only with `remote`."""
    from diva_jax.training import checkpoint  # Here, because jax is slow to import.

    if paths.is_remote(place.source) and not remote:
        return None
    try:
        folder = paths.absolute(paths.folder(place.source, "source"))
        there = (folder / "checkpoints" / str(place.step)).exists()
    except (UserError, ValueError, OSError, RuntimeError):  # There is no such bucket, user or path.
        return None
    if there:
        return folder if place.checkpoint in ("", checkpoint.identity(folder, place.step)) else None
    return folder if any(row["step"] >= place.step for row in _metrics(folder / "metrics.jsonl")) else None


def _results(path: epath.Path) -> Results | None:
    again = "it was not written by this version of diva_jax.evaluate, run the evaluation again"
    content = json_files.read(path, Any, again, None)
    if content is None:
        return None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise UserError(f"{path} is not of schema {SCHEMA}: {again}")
    results = json_files.checked(path, content, Results, again)
    tasks = {name: _without_equal_readouts(task) for name, task in results.tasks.items()}
    return results.model_copy(update={"tasks": tasks})


def _without_equal_readouts(task: Task) -> Task:
    """Merges readouts that are the same, as a backbone's published readout and its pooled embedding can be: metrics
    with equal values everywhere become the first of them, whose title names all readouts."""

    def values(metric: str) -> list:
        parts = [*task.comparisons, *(part for w in task.weights.values() for part in (w, *w.patterns))]
        flips = [(i, f) for i, c in enumerate(task.comparisons) for f in c.flipped if f.metric == metric]
        flips = [(i, f.model_copy(update={"metric": "", "before": [], "after": []})) for i, f in flips]
        return [task.metrics[metric].answers, [part.scores.get(metric) for part in parts], flips]

    metrics: dict[str, Metric] = {}
    for metric, info in task.metrics.items():
        first = next((m for m in metrics if info.readout and values(m) == values(metric)), metric)
        same = f"{metrics[first].title} and {info.readout}, which are the same" if first != metric else info.title
        metrics[first] = task.metrics[first].model_copy(update={"title": same})
    return task.model_copy(update={"metrics": metrics})


def _metrics(path: epath.Path) -> list[dict[str, Any]]:
    """Reads rows, sorted by step. An incomplete last line (still being written, or the run was killed) is skipped."""
    lines = json_files.read_bytes(path, json_files.MAX_LINES_BYTES).splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    rows = []
    for number, line in enumerate(lines, 1):
        row = json_files.parse(path, line, number)
        if not isinstance(row, dict) or not isinstance(row.get("step"), int) or not 0 <= row["step"] < 2**53:
            raise UserError(f"{path}, line {number} has no step, so it is not a row of a training log: remove it")
        rows.append(row)
    return sorted(rows, key=lambda row: row["step"])
