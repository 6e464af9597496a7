"""A run's checkpoint as a source of weights: what it trained, over the weights it began with."""

import json

import numpy as np
from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from diva_jax import objectives
from diva_jax.common import paths
from diva_jax.common.errors import UserError, listing
from diva_jax.models import backbones, layers
from diva_jax.models.backbones import Spec, spec_of
from diva_jax.training import checkpoint, partition
from diva_jax.weights import clip, loading, names, readers, sources
from diva_jax.weights.tensors import Tensors


def config_of(workdir: epath.PathLike) -> ConfigDict:
    """The config that a run wrote into its workdir.

    Raises:
      UserError: there is no run in the workdir.
    """
    path = paths.folder(workdir, "--workdir") / "config.json"
    if not path.exists():
        raise UserError(f"--workdir={workdir} holds no run: give the --workdir of python -m diva_jax.main")
    return ConfigDict(readers.read_json(path))


def choose_step(workdir: epath.PathLike, step: int | None) -> int:
    """`step`, or the newest one; a UserError lists those that exist."""
    there = checkpoint.steps(workdir)
    if not there:
        raise UserError(f"--workdir={workdir} has no checkpoint yet: let the run save one")
    if step is None:
        return there[-1]
    if step not in there:
        raise UserError(f"--step={step} has no checkpoint in {workdir}: use one of {listing(there)}")
    return step


def _trained(workdir: epath.PathLike, step: int) -> tuple[dict, dict]:
    checkpoints = checkpoint.Checkpoints(workdir)
    try:
        return checkpoints.restore_params(step, checkpoints.trained(step))
    finally:
        checkpoints.close()


def _over(base: sources.ClipSource, spec: Spec, params: dict) -> dict[str, np.ndarray]:
    """The vision tower in open_clip's names: `params` where they were trained, the rest from `base`."""
    state = nnx.state(layers.abstract(lambda rngs: backbones.build(spec, rngs=rngs)))
    if any(partition.name_of(path) not in params for path in names.flat(state)):
        state = loading.fill_vision(base, spec, state, loading.host_put)
    filled = {p: v.replace(params.get(partition.name_of(p), v.get_value())) for p, v in names.flat(state).items()}
    return names.to_torch(nnx.from_flat_state(filled), clip.vision_table(spec))


def checkpoint_source(workdir: epath.PathLike, step: int | None = None) -> tuple[sources.ClipSource, dict]:
    """The tuned model of a run, both towers.

    Args:
      workdir: of the run.
      step: of a checkpoint; default the newest.

    Returns:
      (source, provenance: {"workdir", "step", "config", "sources"}).

    Raises:
      UserError: no run, no checkpoint, no such step, or the weights it began with are gone or others.
    """
    config = config_of(workdir)
    step = choose_step(workdir, step)
    params, meta = _trained(workdir, step)
    kinds = objectives.find(config.objective).PRETRAINED
    attribute = next((a for a, kind in kinds.items() if kind == "vision"), None)
    if attribute is None:
        raise UserError(f"--workdir={workdir} trained no vision encoder: there is nothing to export")
    spec = spec_of(config)
    base = sources.open_clip_source(config.backbone.source, "config.backbone.source")
    began = meta["sources"][attribute]
    if (found := readers.fingerprint(base.files)) != began["sha256"]:
        raise UserError(
            f"{base.where} is not the checkpoint that the run began with (sha256 {found[:12]}, "
            f"{began['sha256'][:12]} expected): put {listing(began['source'])} back"
        )
    tuned = _over(base, spec, {n.removeprefix(f"{attribute}/"): a for n, a in params.items()})
    tensors = Tensors({**base.tensors, **tuned}, base.files)
    where = f"{workdir}, step {step}"
    provenance = dict(
        workdir=str(workdir), step=step, config=json.loads(config.to_json()), sources=meta["sources"], base=base.where
    )
    return sources.ClipSource(where, "checkpoint", tensors, spec, tokenizer=base.tokenizer), provenance
