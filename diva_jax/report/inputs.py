"""Reads and validates a report's input: results.json of an evaluation, metrics.jsonl and config.json of a run."""

import dataclasses
import json
import shlex
from typing import Any

from etils import epath

from diva_jax.common import paths
from diva_jax.common.errors import UserError, brief
from diva_jax.report import schema

_MOST_BYTES = 2**28  # Of a file that is read.
_DEEPEST = 20  # Levels of a config that are shown one by one.


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
      name: the name of the workdir.
      index: the index of its colour. If an evaluation has weights of this run, it is the index of the first of them.
      config: the content of config.json; empty if there is no such file.
      rows: the rows of metrics.jsonl, sorted by step.
      sessions: when and where it ran, see `training.metrics.Writer`; empty if there is no sessions.json.
      labels: the labels of the evaluation's weights that are checkpoints of this run.
    """

    name: str
    index: int
    config: dict[str, Any]
    rows: list[dict[str, float]]
    sessions: list[dict[str, Any]]
    labels: tuple[str, ...]

    @property
    def total(self) -> int | None:
        """Number of steps of the whole run, or None if the config does not contain it."""
        steps = self.config.get("steps")
        return int(steps) + self.warmup if schema.usable(steps) else None

    @property
    def warmup(self) -> int:
        """Number of steps of the stage that trains only visual_proj."""
        condition = self.config.get("condition")
        steps = condition.get("warmup_steps") if isinstance(condition, dict) else 0
        return int(steps) if schema.usable(steps) else 0

    def curve(self, key: str) -> list[tuple[float, float]]:
        """Returns [(step, value)] of one key, finite values only."""
        return [(r["step"], float(r[key])) for r in self.rows if schema.usable(r.get(key))]

    def seconds(self) -> float | None:
        """Returns the time of the run up to its last row, summed over its sessions [s]; None if it was not logged."""
        if not (clock := [v for _, v in self.curve("seconds")]):
            return None
        # Each session counts from zero.
        ends = [a for a, b in zip(clock, [*clock[1:], -1.0], strict=True) if b < a]
        return sum(ends)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The content of a report.

    Attributes:
      folder: the folder that the report is written to.
      results: the content of results.json, or None if there is no evaluation.
      runs: the training runs; empty if there are none.
      estimates: the content of images.json, or None if there is no such file.
    """

    folder: epath.Path
    results: dict[str, Any] | None
    runs: list[Run]
    estimates: dict[str, Any] | None = None


def read(folder: epath.PathLike) -> Inputs:
    """Reads an evaluation's output folder, a training workdir, or one that is both.

    The workdirs that an evaluation's weights came from are read as well if they still exist.

    Raises:
      UserError: there is nothing to report on, or a file is invalid; the message gives the file and line.
    """
    folder = paths.folder(folder, "DIR")
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give an evaluation's --out folder or a training --workdir")
    results = _results(folder / "results.json")
    folders: dict[epath.Path, tuple[int, tuple[str, ...]]] = {paths.absolute(folder): (1, ())}
    for i, w in enumerate((results or {}).get("weights", [])):
        if w.get("step") is not None and (source := _existing(w.get("source") or "", paths.is_remote(folder))):
            index, labels = folders.get(source, (i, ()))
            folders[source] = index, (*labels, w["label"])
    runs = [r for r in (_run(path, *place) for path, place in folders.items()) if r.rows]
    if results is None and not runs:
        raise UserError(
            f"{folder} has neither results.json nor logged steps in metrics.jsonl: give an evaluation's output folder "
            f"(python -m diva_jax.evaluate --out={shlex.quote(str(folder))}) or a training workdir"
        )
    return Inputs(folder, results, runs, _estimates(folder / "images.json"))


def _existing(source: str, remote: bool) -> epath.Path | None:
    """The workdir that weights came from, or None where it cannot be found; one in a bucket only with `remote`."""
    if not source or (paths.is_remote(source) and not remote):
        return None
    try:
        found = paths.absolute(paths.folder(source, "source"))
        return found if found.is_dir() else None
    except (UserError, ValueError, OSError, RuntimeError):  # No such bucket, user or path.
        return None


def _run(folder: epath.Path, index: int, labels: tuple[str, ...]) -> Run:
    path = folder / "config.json"
    config = _json(path, _bytes(path)) if path.is_file() else {}
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a config (a JSON object): restore or remove it")
    path = folder / "sessions.json"
    sessions = _json(path, _bytes(path)) if path.is_file() else []
    try:
        schema.check_sessions(sessions)
    except schema.Wrong as e:
        raise UserError(f"{path}: {e}: restore or remove it") from e
    return Run(folder.name, index, config, _metrics(folder / "metrics.jsonl"), sessions, labels)


def _bytes(path: epath.Path) -> bytes:
    try:
        if (size := path.stat().length) > _MOST_BYTES:
            raise UserError(f"{path} has {size} bytes, more than the {_MOST_BYTES} that a report reads: remove rows")
        return path.read_bytes()
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}): check its permissions") from e


def _json(path: epath.Path, text: bytes, line: int | None = None) -> Any:
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError) as e:  # Not JSON, or not UTF-8.
        where = f"line {line}" if line else f"line {getattr(e, 'lineno', 1)}"
        raise UserError(f"{path}, {where} is not JSON ({brief(getattr(e, 'msg', e))}): repair or remove it") from e


def _metrics(path: epath.Path) -> list[dict[str, float]]:
    """Reads rows, sorted by step. An incomplete last line (still being written, or the run was killed) is skipped."""
    if not path.is_file():
        return []
    lines = _bytes(path).splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    rows = []
    for number, line in enumerate(lines, 1):
        row = _json(path, line, number)
        if not isinstance(row, dict) or not isinstance(row.get("step"), int) or not 0 <= row["step"] < 2**53:
            raise UserError(f"{path}, line {number} has no step, so it is not a row of a training log: remove it")
        rows.append(row)
    return sorted(rows, key=lambda r: r["step"])


def _results(path: epath.Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    results = _json(path, _bytes(path))
    again = "it was not written by this version of diva_jax.evaluate, run the evaluation again"
    if not isinstance(results, dict) or results.get("schema") != 1:
        raise UserError(f"{path} is not of schema 1: {again}")
    try:
        schema.check(results)
    except schema.Wrong as e:
        raise UserError(f"{path}: {e}: {again}") from e
    return _without_empty_intervals(results)


def _estimates(path: epath.Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    estimates = _json(path, _bytes(path))
    try:
        schema.check_estimates(estimates)
    except schema.Wrong as e:
        raise UserError(f"{path}: {e}: write it again, or remove it") from e
    return estimates


def _without_empty_intervals(tree: Any) -> Any:
    """Replaces intervals of width zero by None, and marks their scores with `alike`.

    Where all items agree, every resample is the same. The interval is then a single point, which says nothing about
    other items and must not be shown as certainty.
    """
    if isinstance(tree, list):
        return [_without_empty_intervals(v) for v in tree]
    if not isinstance(tree, dict):
        return tree
    ends = tree.get("interval")
    if isinstance(ends, list) and len(ends) == 2 and ends[0] == ends[1]:
        return tree | {"interval": None, "alike": True}
    return {k: _without_empty_intervals(v) for k, v in tree.items()}


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens a nested config to {"a.b.c": value}."""
    out = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value and prefix.count(".") < _DEEPEST:
            out.update(flat(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = value
    return out
