"""What a report needs of results.json: the types of all values that it shows, and that names belong together.

A form is a function (value, where) that raises `Wrong`. Fields that no form names may have any value.
"""

from collections.abc import Callable
from typing import Any

from diva_jax.common.errors import brief
from diva_jax.common.fields import finite

Form = Callable[[Any, str], None]
_LARGEST = 1e100  # Of a number; axes of charts are computed with its multiples.


class Wrong(Exception):
    """A value has not the form that it must have; the message says where."""


def usable(value: Any) -> bool:
    """Whether a value is a number that charts can show."""
    return finite(value) and abs(value) < _LARGEST


def _a(kind: str, good: Callable[[Any], bool]) -> Form:
    def form(value: Any, where: str) -> None:
        if not good(value):
            raise Wrong(f"{where} is {brief(value, 40)} and not {kind}")

    return form


_TEXT = _a("a text", lambda v: isinstance(v, str))
_NUMBER = _a("a number", usable)
_COUNT = _a("a count", lambda v: isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**53)
_FLAG = _a("true or false", lambda v: isinstance(v, bool))
_OBJECT = _a("an object", lambda v: isinstance(v, dict))
_LIST = _a("a list", lambda v: isinstance(v, list))


def _or_null(form: Form) -> Form:
    return lambda value, where: None if value is None else form(value, where)


def _list_of(form: Form, length: int | None = None) -> Form:
    def listed(value: Any, where: str) -> None:
        _LIST(value, where)
        if length is not None and len(value) != length:
            raise Wrong(f"{where} has {len(value)} entries and not {length}")
        for i, entry in enumerate(value):
            form(entry, f"{where}[{i}]")

    return listed


def _by_name(form: Form) -> Form:
    def named(value: Any, where: str) -> None:
        _OBJECT(value, where)
        for name, entry in value.items():
            form(entry, f"{where}.{name[:60]}")

    return named


def _record(required: dict[str, Form], **optional: Form) -> Form:
    def record(value: Any, where: str) -> None:
        _OBJECT(value, where)
        for name, form in (required | optional).items():
            if name in value:
                form(value[name], f"{where}.{name}")
            elif name in required:
                raise Wrong(f"{where} has no {name!r}")

    return record


_INTERVAL = _or_null(_list_of(_NUMBER, 2))
_TEST = _or_null(_record({"won": _COUNT, "lost": _COUNT, "p": _NUMBER}))
_SCORE = _record({"score": _NUMBER}, interval=_INTERVAL, seeds=_list_of(_NUMBER), seeds_std=_or_null(_NUMBER))
_DIFFERENCE = _record({"difference": _NUMBER}, interval=_INTERVAL, mcnemar=_TEST)


def _compared(value: Any, where: str) -> None:
    _OBJECT(value, where)
    (_DIFFERENCE if "difference" in value else _SCORE)(value, where)


def _classes(value: Any, where: str) -> None:
    """`zeroshot` writes how many classes there are, `segmentation` a record for each."""
    (_LIST_OF_CLASSES if isinstance(value, list) else _COUNT)(value, where)


_LIST_OF_CLASSES = _list_of(_record({"name": _TEXT}))
_SCORES = _by_name(_SCORE)
_FLIP = _record(
    {"metric": _TEXT, "won": _FLAG},
    group=_or_null(_TEXT),
    images=_list_of(_TEXT),
    texts=_list_of(_TEXT),
    before=_list_of(_NUMBER),
    after=_list_of(_NUMBER),
)
_FOUND = _record(
    {"scores": _SCORES},
    patterns=_list_of(_record({"name": _TEXT, "scores": _SCORES})),
    timesteps=_list_of(_record({"low": _NUMBER, "high": _NUMBER, "scores": _SCORES})),
    classes=_classes,
    pictures=_list_of(_record({"image": _TEXT, "truth": _TEXT, "predicted": _TEXT})),
)
_METRIC = _record({"title": _TEXT, "unit": _TEXT}, better=_TEXT)
_TASK = _record(
    {"title": _TEXT, "metrics": _by_name(_METRIC), "weights": _by_name(_FOUND)},
    count=_or_null(_COUNT),
    items=_TEXT,
    comparisons=_list_of(
        _record({"before": _TEXT, "after": _TEXT, "scores": _by_name(_compared)}, flipped=_list_of(_FLIP))
    ),
)
_RESULTS = _record(
    {
        "tasks": _by_name(_TASK),
        "weights": _list_of(_record({"label": _TEXT}, source=_or_null(_TEXT), step=_or_null(_COUNT))),
    },
    created=_TEXT,
    seconds=_NUMBER,
    devices=_TEXT,
    versions=_OBJECT,
    config=_or_null(_OBJECT),
    options=_or_null(_OBJECT),
)


_ESTIMATES = _record(
    {"title": _TEXT, "note": _TEXT, "rows": _list_of(_list_of(_record({"image": _TEXT, "caption": _TEXT})))}
)
_SESSIONS = _list_of(_record({}, started=_TEXT, devices=_TEXT, versions=_OBJECT))


def check_sessions(sessions: Any) -> None:
    """Checks the content of a run's sessions.json.

    Raises:
      Wrong: it is not a list of sessions.
    """
    _SESSIONS(sessions, "it")


def check_estimates(estimates: Any) -> None:
    """Checks the content of images.json, see `report`.

    Raises:
      Wrong: it is not rows of pictures with captions.
    """
    _ESTIMATES(estimates, "it")


def check(results: Any) -> None:
    """Checks the content of results.json.

    Raises:
      Wrong: a value is missing or of another type, or a name is used that is not listed.
    """
    _RESULTS(results, "it")
    if not results["tasks"] or not results["weights"]:
        raise Wrong("it has no tasks or no weights")
    labels = [w["label"] for w in results["weights"]]
    for name, task in results["tasks"].items():
        used = [(label, "weights", labels) for label in task["weights"]]
        for found in task["weights"].values():
            used += [(metric, "metrics", task["metrics"]) for metric in found["scores"]]
        for compared in task.get("comparisons", ()):
            used += [(compared[side], "weights", task["weights"]) for side in ("before", "after")]
            used += [(metric, "metrics", task["metrics"]) for metric in compared["scores"]]
            for metric, found in compared["scores"].items():
                sides = [task["weights"].get(compared[side], {"scores": {}}) for side in ("before", "after")]
                if "difference" in found and not all(metric in side["scores"] for side in sides):
                    raise Wrong(f"{name[:60]} compares {brief(metric)}, which has no scores")
        for used_name, where, known in used:
            if used_name not in known:
                raise Wrong(f"{name[:60]} uses {brief(used_name)}, which is not one of its {where}")
