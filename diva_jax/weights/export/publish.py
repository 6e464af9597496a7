"""An export with its card: what the card says of license, base model and scores, and the push to the hub."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diva_jax.common import paths
from diva_jax.common.errors import RunError, UserError, listing
from diva_jax.common.log import say
from diva_jax.models.backbones import Spec
from diva_jax.weights import origins, places, runs, writers
from diva_jax.weights.export import cards, layouts, vocabulary


@dataclasses.dataclass(frozen=True)
class Options:
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


def scores_of(file: str, source: str, step: int | None) -> dict[str, Any]:
    """Finds the scores of the exported weights in a results.json.

    Args:
      file: the file, or the folder that holds it.
      source: the workdir of the run, or the source of weights, that is exported.
      step: the step of the run's checkpoint; None for a source.

    Returns:
      {"file", "created", "reference": label of the weights that they are compared with or "", "rows": [{"task",
      "title", "unit", "score", "before", "difference"}]}; of a row's last three each is an entry of results.json or
      None.

    Raises:
      UserError: the file cannot be read, or has no scores of these weights.
    """
    path = Path(file).expanduser()
    path = path / "results.json" if path.is_dir() else path
    try:
        results = json.loads(path.read_text("utf-8"))
        weights = results["weights"]
        here = Path(source).expanduser().resolve()
        mine = [
            w["label"]
            for w in weights
            if w["step"] == step and (w["source"] == source or Path(w["source"]).expanduser().resolve() == here)
        ]
        if not mine:
            known = [w["source"] + (f":{w['step']}" if w["step"] is not None else "") for w in weights]
            what = source if step is None else f"{source}:{step}"
            raise UserError(f"{path} has no scores of {what}, only of {listing(known, 5)}: evaluate these weights")
        reference = weights[0]["label"] if weights[0]["label"] != mine[0] else ""
        rows = [row for task in results["tasks"].values() for row in _rows(task, mine[0], reference)]
        return {"file": path.name, "created": results["created"], "reference": reference, "rows": rows}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
        raise UserError(f"{path} is not a results.json of diva_jax.evaluate ({e!r}): give that file") from e


def _rows(task: Mapping[str, Any], label: str, reference: str) -> list[dict[str, Any]]:
    between = next(
        (c["scores"] for c in task["comparisons"] if (c["before"], c["after"]) == (reference, label)), {}
    )  # fmt: skip
    found = []
    for metric, info in task["metrics"].items():
        score, difference = task["weights"][label]["scores"].get(metric), between.get(metric)
        before = task["weights"][reference]["scores"].get(metric) if reference else None
        if score or difference:
            row = {"task": task["title"], "title": info["title"], "unit": info["unit"]}
            found.append(row | {"score": score, "before": before, "difference": difference})
    return found


def _check_hub(repo: str) -> None:
    """Checks the name and the login, before anything is loaded."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError("it must be USER/NAME")
    except HFValidationError as e:
        raise UserError(f"--push_to_hub={repo} is no name of a hub repository ({e}): give USER/NAME") from e
    try:
        HfApi().whoami()
    except Exception as e:  # Of any kind, from DNS to a token that has expired.
        raise UserError(
            f"--push_to_hub={repo}: the hub does not know this account ({paths.reason(e)}): run hf auth login, or set "
            "HF_TOKEN"
        ) from e


def _push(out: Path, repo: str) -> None:
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        url = api.upload_folder(repo_id=repo, folder_path=out, commit_message="Export of diva_jax")
    except Exception as e:
        raise RunError(
            f"{out} is written, but was not pushed to {repo} ({paths.reason(e)}): push it with hf upload {repo} {out}"
        ) from e
    say(f"pushed to {url}")


def export(
    source: str | os.PathLike,
    out: str | os.PathLike,
    fmt: str,
    dtype: str,
    options: Options,
    *,
    run: bool,
    step: int | None = None,
    spec: Spec | None = None,
) -> None:
    """Exports a run or a source of weights with its card.

    Args:
      source: the workdir of a run, or a source of weights.
      out: a folder of this machine that does not exist or is empty.
      fmt, dtype: as for `layouts.export`.
      options: see `Options`.
      run: whether the source is the workdir of a run.
      step: of the run's checkpoint; None: the newest.
      spec: for a source that does not say what it is.

    Raises:
      UserError: as `layouts.export`; the results have no scores of these weights; the hub refuses.
      RunError: as `layouts.export`; the export is written, but was not pushed.
    """
    source, out = os.fspath(source), paths.local(os.fspath(out), "--out")
    writers.refuse_taken(out)
    if options.push_to_hub:
        _check_hub(options.push_to_hub)
    opened = runs.open_run(source, step) if run else origins.open_source(source)
    spec = spec or opened.described(source)
    provenance, began = opened.run, source
    if provenance:
        source, step = provenance["workdir"], provenance["step"]
        began = provenance["config"]["backbone"]["source"]
    if options.tokenizer:
        opened = vocabulary.add(opened, spec, options.tokenizer)
    note = vocabulary.note(opened, spec, fmt)
    card = cards.card(
        opened,
        spec,
        fmt,
        dtype,
        provenance,
        [note] if note else [],
        path=str(out),
        hub=options.push_to_hub,
        license=options.license,
        base_model=options.base_model or places.hub_id(began),
        scores=scores_of(options.results, source, step) if options.results else None,
    )
    layouts.export(opened, spec, out, fmt, dtype=dtype, card=card)
    if options.push_to_hub:
        _push(out, options.push_to_hub)
