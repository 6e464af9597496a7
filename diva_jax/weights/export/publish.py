"""An export with its card, and its push to the hub."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from diva_jax.common import paths
from diva_jax.common.errors import RunError, UserError, listing
from diva_jax.common.log import say
from diva_jax.models.backbones import Spec
from diva_jax.weights import origins, places, runs, writers
from diva_jax.weights.export import cards, layouts, vocabulary
from diva_jax.weights.tensors import Tensors


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
    options: ExportOptions,
    *,
    run: bool,
    step: int | None = None,
    spec: Spec | None = None,
    params: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Exports a run or a source of weights with its card, to a local folder that does not exist or is empty, as
    `layouts.export`.

    `run`: whether the source must be the workdir of a run, then at `step`, by default the newest. `spec` is for a
    source that does not say what it is; `params` are other values of whole towers of it, see `runs.whole_towers`. A
    UserError as of `layouts.export`, where the results have no scores of these weights, or the hub refuses; a RunError
    also where the export is written, but was not pushed.
    """
    source, out = os.fspath(source), paths.local(os.fspath(out), "--out")
    writers.refuse_taken(out)
    if options.push_to_hub:
        _check_hub(options.push_to_hub)
    opened = runs.open_run(source, step) if run else origins.open_source(source)
    spec = spec or opened.described(source)
    if params is not None:
        towers = runs.whole_towers(params, spec)
        tensors = Tensors({**opened.tensors, **runs.in_open_clip_names(towers, spec)}, opened.files)
        where = f"{opened.where}, with other values of {listing(sorted(towers))}"
        opened = dataclasses.replace(opened, where=where, tensors=tensors)
    began = source
    if opened.run:
        source, step, began = opened.run["workdir"], opened.run["step"], opened.run["config"]["backbone"]["source"]
    if options.tokenizer:
        opened = vocabulary.add(opened, spec, options.tokenizer)
    card = cards.card(
        opened,
        spec,
        fmt,
        dtype,
        note=vocabulary.note(opened, spec, fmt),
        path=str(out),
        hub=options.push_to_hub,
        license=options.license,
        base_model=options.base_model or places.hub_id(began),
        scores=cards.scores_of(options.results, source, step) if options.results else None,
    )
    layouts.export(opened, spec, out, fmt, dtype=dtype, card=card, hub=options.push_to_hub)
    if options.push_to_hub:
        _push(out, options.push_to_hub)
