"""The README of an export, as the hub's model cards are: properties, use, scores, caveats, origin and config."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diva_jax.common import json_files, machine, paths
from diva_jax.common.errors import UserError, listing
from diva_jax.common.results_schema import Difference, Results, Score, Task
from diva_jax.models.backbones import Spec, architecture
from diva_jax.weights import readers
from diva_jax.weights.origins import ClipSource

_TEMPLATE = Path(__file__).with_name("card.md.j2")


def card(
    source: ClipSource,
    spec: Spec,
    fmt: str,
    dtype: str,
    *,
    note: str = "",
    path: str = "PATH",
    hub: str = "",
    license: str = "",
    base_model: str = "",
    scores: Mapping[str, Any] | None = None,
) -> str:
    """The content of README.md of an export in the format `fmt`: "open_clip", "hf" or "pt".

    `note` says that the export has no tokenizer, see `vocabulary.note`; `path` is the export's folder in the lines that
    load it, or `hub` the repository that it is pushed to. `license` and `base_model` are as the hub has them; `scores`
    is a result of `scores_of`.
    """
    from huggingface_hub import ModelCard, ModelCardData

    run = paths.values_without_secrets(source.run)
    method = run["config"]["objective"] if run else ""
    has_text = spec.has_text and fmt != "pt"
    squash = "squashed to a square" if spec.resize_mode.startswith("squash") else "shortest side resized"
    squash += "" if spec.resize_mode == "squash" else f" to {spec.resize}, centre cropped"
    content = ModelCard.from_template(
        ModelCardData(
            license=license or "other",
            license_name=None if license else "that-of-the-base-model",
            base_model=base_model or None,
            base_model_relation="finetune" if base_model and method else None,
            pipeline_tag="zero-shot-image-classification" if has_text else "image-feature-extraction",
            library_name="transformers" if fmt == "hf" else architecture(spec.arch).LIBRARY,
            tags=(["clip"] if spec.has_text else []) + ([method] if method else []),
        ),
        template_path=_TEMPLATE,
        title=(spec.open_clip_name or f"{spec.arch} {spec.image_size}") + (f", tuned with {method}" if method else ""),
        properties=f"{spec.image_size} px, patch {spec.patch_size}, width {spec.width}, {spec.layers} layers, "
        f"{spec.activation}, weights in {dtype}. Images: {squash}, {spec.interpolation}, mean {list(spec.mean)}, std "
        f"{list(spec.std)}.",
        fmt=fmt,
        scheme="hf-hub" if hub else "local-dir",
        path=hub or path,
        has_text=has_text,
        encodes_text=has_text and not note,
        context_length=spec.text.context_length,
        note=note,
        scores=scores,
        reference=scores and scores["reference"],
        table=_table(scores) if scores else [],
        source=source,
        run=run,
        sha256="" if run else readers.fingerprint(source.files),
        config=json.dumps(run["config"], indent=1) if run else "",
        versions=", ".join(f"{package} {version}" for package, version in machine.describe()["versions"].items()),
    )
    return str(content)


def scores_of(file: str, source: str, step: int | None) -> dict[str, Any]:
    """The scores of the exported weights, a source or the workdir of a run at `step`, in a results.json or the folder
    that holds it.

    Returns {"file", "created", "reference": label of the weights that they are compared with or "", "rows": [{"task",
    "title", "unit", "score", "before", "difference"}]}; of a row's last three each is an entry of results.json or None.
    A UserError where the file cannot be read, or has no scores of these weights.
    """
    path = Path(file).expanduser()
    path = path / "results.json" if path.is_dir() else path
    try:
        results = json_files.read(path, Results, "run the evaluation again")
    except UserError as e:
        raise UserError(f"{path} is not a results.json of diva_jax.evaluate ({e}): give that file") from e
    here, weights = Path(source).expanduser().resolve(), [w for w in results.weights if w.source]
    mine = [
        w.label
        for w in weights
        if w.step == step and (w.source == source or Path(w.source).expanduser().resolve() == here)
    ]
    if not mine:
        known = [w.source + (f":{w.step}" if w.step is not None else "") for w in weights]
        what = source if step is None else f"{source}:{step}"
        raise UserError(f"{path} has no scores of {what}, only of {listing(known, 5)}: evaluate these weights")
    reference = results.labels[0] if results.labels[0] != mine[0] else ""
    rows = [row for task in results.tasks.values() for row in _rows(task, mine[0], reference)]
    return {"file": path.name, "created": results.created, "reference": reference, "rows": rows}


def _rows(task: Task, label: str, reference: str) -> list[dict[str, Any]]:
    pairs = {(c.before, c.after): c.scores for c in task.comparisons}
    scores = {name: weights.scores for name, weights in task.weights.items()}
    differences, rows = pairs.get((reference, label), {}), []
    for metric, info in task.metrics.items():
        score, difference = scores.get(label, {}).get(metric), differences.get(metric)
        if score or difference:
            row = {"task": task.title, "title": info.title, "unit": info.unit, "score": score, "difference": difference}
            rows.append(row | {"before": scores.get(reference, {}).get(metric)})
    return rows


def _figure(score: Score | Difference | None, key: str, unit: str) -> str:
    if (value := getattr(score, key, None)) is None:
        return ""
    form = ".2f" if unit == "%" else ".4g"
    text = f"{value:{'+' * (key == 'difference')}{form}}"
    return text + (" ({:{f}} to {:{f}})".format(*score.interval, f=form) if score.interval else "")


def _table(scores: Mapping[str, Any]) -> list[list[str]]:
    """Returns the cells of the table of scores, the head first."""
    reference = scores["reference"]
    table = [["task", "score", *([reference] if reference else []), "this model", *(["difference"] * bool(reference))]]
    for row in scores["rows"]:
        unit, difference = row["unit"], row["difference"]
        cells = [row["task"], row["title"] + (f" [{unit}]" if unit else ""), _figure(row["score"], "score", unit)]
        if reference:
            cells.insert(2, _figure(row["before"], "score", unit))
            cells.append(_figure(difference, "difference", unit) or _figure(difference, "score", unit))
        table.append([cell.replace("|", "\\|") for cell in cells])
    return table
