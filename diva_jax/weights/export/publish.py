"""An export with its card, and its push to the hub."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diva_jax.common import json_files, log, paths
from diva_jax.common.errors import RunError, UserError, explained, listing
from diva_jax.common.results_schema import Results
from diva_jax.models.backbones import Spec, architecture
from diva_jax.weights import formats, origins
from diva_jax.weights.export import layouts


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What the card says, and where the export is pushed.

    Attributes:
      license: an identifier as the hub has them, such as "mit"; empty: the card says that of the base model applies.
      base_model: a hub id; empty: that of the source, where it is one.
      results: a results.json of `python -m diva_jax.evaluate` with these weights, or its folder; empty: no scores.
      push_to_hub: USER/NAME of a repository of the hub, which is created where it does not exist; empty: none.
      tokenizer: a folder with the tokenizer's files, in place of the source's; empty: those of the source.
    """

    license: str = ""
    base_model: str = ""
    results: str = ""
    push_to_hub: str = ""
    tokenizer: str = ""


def card(
    source: origins.ClipSource, spec: Spec, fmt: str, dtype: str, options: ExportOptions = ExportOptions(), **shown: Any
) -> str:
    """The content of README.md of an export in the format `fmt`: "open_clip", "hf" or "pt". What is shown may have
    `path`, the export's folder in the lines that load it; `note`, that of `layouts.without_tokenizer`; and `scores`, a
    result of `scores_of`."""
    from huggingface_hub import ModelCard, ModelCardData

    run = paths.values_without_secrets(source.run)
    method = run["config"]["objective"] if run else ""
    has_text, hub, base_model = spec.has_text and fmt != "pt", options.push_to_hub, options.base_model
    shown = {"path": "PATH", "note": "", "scores": None} | shown | ({"path": hub} if hub else {})
    content = ModelCard.from_template(
        ModelCardData(
            license=options.license or "other",
            license_name=None if options.license else "that-of-the-base-model",
            base_model=base_model or None,
            base_model_relation="finetune" if base_model and method else None,
            pipeline_tag="zero-shot-image-classification" if has_text else "image-feature-extraction",
            library_name="transformers" if fmt == "hf" else architecture(spec.arch).CHECKPOINT.library,
            tags=(["clip"] if spec.has_text else []) + ([method] if method else []),
        ),
        template_path=Path(__file__).with_name("card.md.j2"),
        spec=spec,
        dtype=dtype,
        fmt=fmt,
        scheme="hf-hub" if hub else "local-dir",
        has_text=has_text,
        encodes_text=has_text and not shown["note"],
        **shown,
        source=source,
        run=run,
        sha256="" if run else formats.fingerprint(source.tensors.files),
        config=json.dumps(run["config"], indent=1) if run else "",
        versions=", ".join(f"{package} {version}" for package, version in log.describe()["versions"].items()),
    )
    return str(content)


def scores_of(file: str, source: str, step: int | None) -> dict[str, Any]:
    """The scores of the exported weights, a source or the workdir of a run at `step`, in a results.json or the folder
    that holds it. Returns {"file", "created", "reference": label of the weights that they are compared with or "",
    "rows": [{"task", "title", "unit", "score", "before", "difference"}]}; of a row's last three each is an entry of
    results.json or None. A UserError where the file cannot be read, or has no scores of these weights."""
    path = paths.expanded(file)
    path = path / "results.json" if path.is_dir() else path
    with explained(f"{path} is not a results.json of diva_jax.evaluate", "give that file", UserError):
        results = json_files.read(path, Results, "run the evaluation again")
    here, weights = paths.expanded(source).resolve(), [w for w in results.weights if w.source]
    same = [w for w in weights if w.source == source or paths.expanded(w.source).resolve() == here]
    mine = [w.label for w in same if w.step == step]
    if not mine:
        known = [w.source + (f":{w.step}" if w.step is not None else "") for w in weights]
        what = source if step is None else f"{source}:{step}"
        raise UserError(f"{path} has no scores of {what}, only of {listing(known, 5)}: evaluate these weights")
    reference = results.labels[0] if results.labels[0] != mine[0] else ""
    rows = []
    for task in results.tasks.values():
        scores = {name: weights.scores for name, weights in task.weights.items()}
        differences = {(c.before, c.after): c.scores for c in task.comparisons}.get((reference, mine[0]), {})
        for metric, info in task.metrics.items():
            score, before = (scores.get(label, {}).get(metric) for label in (mine[0], reference))
            row = dict(score=score, before=before, difference=differences.get(metric))
            if score or row["difference"]:
                rows.append({"task": task.title, "title": info.title, "unit": info.unit, **row})
    return {"file": path.name, "created": results.created, "reference": reference, "rows": rows}


def export(
    source: str | os.PathLike,
    out: str | os.PathLike,
    fmt: str,
    dtype: str,
    options: ExportOptions,
    *,
    run: bool,
    step: int | None = None,
    spec: Spec | None = None,
    params: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Exports a run or a source of weights with its card, to a local folder that does not exist or is empty, as
    `layouts.export`. `run`: whether the source must be the workdir of a run, then at `step`, by default the newest.
    `spec` is for a source that does not say what it is; `params` are other values of whole towers of it, see
    `origins.whole_towers`. A UserError as of `layouts.export`, where the results have no scores of these weights, or
    the hub refuses; a RunError also where the export is written, but was not pushed."""
    source, out = os.fspath(source), paths.local(os.fspath(out), "--out")
    formats.refuse_taken(out)
    if repo := options.push_to_hub:  # The name and the login are checked before anything is loaded.
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        with explained(f"--push_to_hub={repo} is no name of a hub repository", "give USER/NAME", HFValidationError):
            validate_repo_id(repo)
            if repo.count("/") != 1:
                raise HFValidationError("it must be USER/NAME")
        problem = f"--push_to_hub={repo}: the hub does not know this account"
        with explained(problem, "run hf auth login, or set HF_TOKEN", Exception):  # DNS, or a token that has expired.
            HfApi().whoami()
    opened = origins.open_run(source, step) if run else origins.open_source(source)
    if spec and (other := origins.other_preparation(opened.spec, spec, opened.where, "--config")):
        raise UserError(f"{other[0]}: leave --config out")
    spec = spec or opened.described(source)
    if params is not None:
        towers = origins.whole_towers(params, spec)
        tensors = formats.Tensors({**opened.tensors, **origins.in_open_clip_names(towers, spec)}, opened.tensors.files)
        where = f"{opened.where}, with other values of {listing(sorted(towers))}"
        opened = dataclasses.replace(opened, where=where, tensors=tensors)
    began = source
    if opened.run:
        source, step, began = opened.run["workdir"], opened.run["step"], opened.run["config"]["backbone"]["source"]
    if options.tokenizer:
        opened = layouts.with_tokenizer(opened, spec, fmt, options.tokenizer)
    about = dataclasses.replace(options, base_model=options.base_model or origins.hub_id(began))
    shown = {"note": layouts.without_tokenizer(opened, spec, fmt), "path": str(out)}
    shown["scores"] = scores_of(options.results, source, step) if options.results else None
    readme = card(opened, spec, fmt, dtype, about, **shown)
    layouts.export(opened, spec, out, fmt, dtype=dtype, card=readme, hub=options.push_to_hub)
    if repo:
        problem = f"{out} is written, but was not pushed to {repo}"
        with explained(problem, f"push it with hf upload {repo} {out}", Exception, kind=RunError):
            HfApi().create_repo(repo, exist_ok=True)
            url = HfApi().upload_folder(repo_id=repo, folder_path=out, commit_message="Export of diva_jax")
        log.say(f"pushed to {url}")
