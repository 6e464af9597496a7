"""The section of versions, sources and configs, and the line of the header that says when and where."""

from html import escape
from typing import Any

from diva_jax.report import wording
from diva_jax.report.inputs import Inputs, flat

_PACKAGES = ("diva_jax", "jax", "flax", "python")  # Whose versions the header names.


def _versions(found: dict[str, str]) -> str:
    return ", ".join(f"{p} {found[p]}" for p in _PACKAGES if p in found)


def _when(iso: str) -> str:
    """`2026-01-31T12:00:00+00:00` -> `2026-01-31 12:00 UTC`."""
    return iso[:16].replace("T", " ") + (" UTC" if iso.endswith("+00:00") else "")


def facts(inputs: Inputs) -> list[str]:
    """Returns one line for the evaluation and one per run: date, duration, devices and versions, as far as recorded."""
    out = []
    if r := inputs.results:
        took = f"{wording.duration(r['seconds'])} long" if r.get("seconds") else ""
        parts = (_when(r.get("created", "")), took, r.get("devices", ""), _versions(r.get("versions", {})))
        out.append("Evaluation: " + ", ".join(p for p in parts if p))
    for run in inputs.runs:
        last, seconds = (run.sessions or [{}])[-1], run.seconds()
        took = f"{wording.duration(seconds)} long" if seconds else ""
        took += f" in {len(run.sessions)} sessions" if len(run.sessions) > 1 else ""
        began = _when(run.sessions[0].get("started", "")) if run.sessions else ""
        parts = (began, took, last.get("devices", ""), _versions(last.get("versions", {})))
        if any(parts):
            out.append(f"Run {run.name}: " + ", ".join(p for p in parts if p))
    return out


def _defaults(config: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the flat default config of a run's objective, with the nearest backbone of the table; None if unknown."""
    import json

    from diva_jax import config as configs  # Slow: it imports jax.
    from diva_jax.common.errors import UserError
    from diva_jax.models import backbones

    mine = flat(config)

    def of(backbone: str) -> dict[str, Any]:
        return flat(json.loads(configs.default(backbone, objective=config["objective"]).to_json()))

    try:
        own = config["backbone"]
        name = min(
            backbones.TABLE,
            key=lambda row: sum(own.get(f) != v for f, v in vars(backbones.TABLE[row]).items() if f != "text"),
        )
        found = of(name)
    except (KeyError, TypeError, AttributeError, UserError):
        return None
    return found if mine.keys() & found.keys() else None


def section(inputs: Inputs) -> str:
    """Returns the content of the section, as lists that can be opened; of configs, what differs from the defaults."""
    lists: list[tuple[str, dict[str, Any], bool]] = []
    if r := inputs.results:
        lists.append(("Versions", {**r.get("versions", {}), "devices": r.get("devices", "")}, False))
        lists.append(("Weights", {w["label"]: _source(w) for w in r["weights"]}, False))
        lists.append(("Data", {n: t["data"] for n, t in r["tasks"].items() if "data" in t}, False))
        lists.append(("Evaluation options", flat(r.get("options") or {}), False))
        lists += _config("Evaluation config", r.get("config") or {})
    for run in inputs.runs:
        lists += _config(f"Training config, {run.name}", run.config)
    return "".join(_details(*entry) for entry in lists if entry[1])


def _config(title: str, config: dict[str, Any]) -> list[tuple[str, dict[str, Any], bool]]:
    """Returns the fields that differ from the defaults, open, and all others, folded."""
    values = flat(config)
    if (defaults := _defaults(config)) is None:
        return [(title, values, False)]
    changed = {k: v for k, v in values.items() if k not in defaults or defaults[k] != v}
    shown = {k: f"{v} (default {defaults[k]})" if k in defaults else v for k, v in changed.items()}
    rest = {k: v for k, v in values.items() if k not in changed}
    return [(f"{title}: what differs from the defaults", shown, True), (f"{title}: the rest", rest, False)]


def _source(w: dict[str, Any]) -> str:
    return f"{w.get('source')}" + (f", step {w['step']}" if w.get("step") is not None else "")


def _details(title: str, values: dict[str, Any], opened: bool) -> str:
    rows = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in values.items())
    return (
        f"<details{' open' if opened else ''}><summary>{escape(title)} <small>{len(values)}</small></summary>"
        f"<dl>{rows}</dl></details>"
    )


def sources(inputs: Inputs) -> str:
    """Returns the text of the footer: the files that the page was made from."""
    files = [n for n in ("results.json", "predictions.csv", "metrics.jsonl") if (inputs.folder / n).is_file()]
    return f"Generated from {', '.join(files)} in {inputs.folder}. Exact values are in the tooltips."
