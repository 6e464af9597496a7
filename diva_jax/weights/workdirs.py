"""A run's checkpoint as a source of weights: what it trained, over the weights it began with."""

import json
from pathlib import Path

import jax
from flax import nnx
from ml_collections import ConfigDict

from diva_jax import backbones, checkpoint, objectives
from diva_jax.config import spec_of
from diva_jax.errors import UserError, listing
from diva_jax.sharding import make_mesh
from diva_jax.step import Program
from diva_jax.weights import clip, loading, names, readers, sources
from diva_jax.weights.readers import Tensors


def config_of(workdir: str | Path) -> ConfigDict:
    """The config that a run wrote into its workdir.

    Raises:
      UserError: there is no run in the workdir.
    """
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"--workdir={workdir} holds no run: give the --workdir of python -m diva_jax.main")
    return ConfigDict(readers.read_json(path))


def choose_step(workdir: str | Path, step: int | None) -> int:
    """`step`, or the newest one; a UserError lists those that exist."""
    there = checkpoint.steps(Path(workdir))
    if not there:
        raise UserError(f"--workdir={workdir} has no checkpoint yet: let the run save one")
    if step is None:
        return there[-1]
    if step not in there:
        raise UserError(f"--step={step} has no checkpoint in {workdir}: use one of {listing(there)}")
    return step


def _trained(config: ConfigDict, workdir: str | Path, step: int) -> tuple[dict, dict, Program]:
    mesh = make_mesh(ConfigDict(dict(data=-1, fsdp=1)), jax.devices()[:1])
    program = Program(config, mesh)
    checkpoints = checkpoint.Checkpoints(Path(workdir), config.checkpoint.keep)
    try:
        params, meta = checkpoints.restore_params(step, {n: program.arrays[n] for n in program.trained})
    finally:
        checkpoints.close()
    return params, meta, program


def checkpoint_source(workdir: str | Path, step: int | None = None) -> tuple[sources.ClipSource, dict]:
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
    params, meta, program = _trained(config, workdir, step)
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
    state = nnx.state(nnx.eval_shape(lambda: backbones.build(spec, rngs=nnx.Rngs(0))))
    if any(f"{attribute}/" + "/".join(map(str, path)) not in params for path, _ in nnx.to_flat_state(state)):
        state = loading.fill_vision(base, spec, state, loading.host_put)
    filled = nnx.from_flat_state(
        {
            path: var.replace(params.get(f"{attribute}/" + "/".join(map(str, path)), var.get_value()))
            for path, var in nnx.to_flat_state(state)
        }
    )
    tuned = names.to_torch(filled, clip.vision_table(spec))
    tensors = Tensors({n: tuned.get(n, t) for n, t in base.tensors.items()} | tuned, base.files)
    where = f"{workdir}, step {step}"
    provenance = dict(
        workdir=str(workdir), step=step, config=json.loads(config.to_json()), sources=meta["sources"], base=base.where
    )
    return sources.ClipSource(where, "checkpoint", tensors, spec, tokenizer=base.tokenizer), provenance
