"""The commands as functions: what `python -m diva_jax.main`, `evaluate` and `export_torch` do."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from diva_jax import config as checks
from diva_jax.api import configs
from diva_jax.common import paths
from diva_jax.common.errors import UserError
from diva_jax.evals import evaluator, results
from diva_jax.training import loop
from diva_jax.weights import places
from diva_jax.weights.export import publish


def train(
    config: ConfigDict | str | os.PathLike,
    workdir: str | os.PathLike,
    *,
    fields: Mapping[str, Any] | None = None,
    init_from: str | None = None,
) -> str:
    """Trains, or resumes from the last checkpoint in the workdir.

    Args:
      config: a result of `config.default`, or a config file.
      workdir: the folder for checkpoints, metrics and the config.
      fields: dotted path of a field -> value, see `configs.read`.
      init_from: WORKDIR or WORKDIR:STEP of another run, see `loop.Run`.

    Returns:
      The workdir, for `load`, `evaluate` and `export`.

    Raises:
      UserError: the config, the data, the weights or the workdir is invalid.
      RunError: the run failed, see `loop.Run.run`.
      KeyboardInterrupt: SIGTERM or the first SIGINT came; the run is saved, and the same call resumes it.
    """
    workdir = os.fspath(workdir)
    run = loop.Run(configs.read(config, fields), workdir, init_from)
    if not run.run():
        raise KeyboardInterrupt(f"saved; the same call resumes {workdir}")
    return workdir


def evaluate(
    config: ConfigDict | str | os.PathLike,
    weights: str | Sequence[str],
    data: Mapping[str, str],
    *,
    out: str | os.PathLike | None = None,
    fields: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluates sets of weights; the first is what every other is compared with.

    Args:
      config: the config of the backbone: a result of `config.default`, or a config file.
      weights: sources of weights or workdirs[:STEP].
      data: task -> where its data is, see docs/EVALUATION.md.
      out: a folder for results.json and predictions.csv, from which `report.write` makes a page; None: nothing is
        written.
      fields: dotted path of a field -> value, such as {"eval.batch_size": 32}.

    Returns:
      The content of results.json.

    Raises:
      UserError: the config, weights or data are invalid.
      RunError: embeddings are not finite.
    """
    weights = [weights] if isinstance(weights, str | os.PathLike) else weights
    weights = [os.fspath(w) for w in weights]
    if not weights or len(set(weights)) < len(weights):
        raise UserError("weights must name one source or more, each once")
    if not data:
        raise UserError("data is empty: give {task: path}, e.g. {'mmvp': 'data/MMVP_VLM'}")
    out = None if out is None else paths.local(os.fspath(out), "out")
    checks.check_runs(weights)
    found, rows = evaluator.run(configs.read(config, fields), weights, {t: os.fspath(p) for t, p in data.items()})
    if out is not None and jax.process_index() == 0:
        results.write(out, found, rows)
    return found


def export(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    format: str = "open_clip",
    step: int | None = None,
    dtype: str = "float32",
    **options: Any,
) -> str:
    """Exports a run, or converts weights of any supported format.

    Args:
      source: the workdir of a run, or a source of weights that describes itself.
      out: the folder to write; it must not exist or be empty.
      format: "open_clip", "hf" (transformers, LLaVA) or "pt" (the vision tower's state dict).
      step: of the run's checkpoint; default the newest.
      dtype: of the exported weights, "float32", "float16" or "bfloat16".
      **options: of `export.publish.ExportOptions`: the card's license and scores, the hub's repository.

    Returns:
      The folder.

    Raises:
      UserError, RunError: as `export.layouts.export`.
    """
    source, out = os.fspath(source), os.fspath(out)
    run = places.as_run(source)
    if step is not None and run is None:
        raise UserError(f"step={step} is for the workdir of a run, which {source} is not: leave it out")
    if run is not None:
        source, step = run[0], run[1] if step is None else step
    checks.check_runs([source])
    publish.export(source, out, format, dtype, publish.ExportOptions(**options), run=run is not None, step=step)
    return out
