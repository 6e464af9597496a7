"""A checkpoint of a run as a source of weights: the tuned towers, and the rest of the initial model."""

import json
from collections.abc import Mapping

import numpy as np
from etils import epath

from diva_jax.common import paths
from diva_jax.common.errors import UserError, listing
from diva_jax.models import backbones
from diva_jax.models.backbones import Spec
from diva_jax.weights import clip, names, origins, readers
from diva_jax.weights.tensors import Tensors


def in_open_clip_names(towers: Mapping[str, Mapping], spec: Spec) -> dict[str, np.ndarray]:
    """The result of `RunAt.towers` ("vision", "text", "logit_scale", "logit_bias") in open_clip's names and layouts."""
    out = {}
    for tower, arrays in towers.items():
        if tower in clip.TOWERS:
            table = clip.table(tower, spec)
            for path in names.flat(clip.abstract(tower, spec)):
                array = np.asarray(arrays["/".join(map(str, path))])
                out[table.torch_name(path)] = np.ascontiguousarray(names.to_torch_layout(path, array))
        else:
            out[tower] = np.asarray(arrays[tower])
    return out


def whole_towers(params: Mapping[str, np.ndarray], spec: Spec) -> dict[str, dict[str, np.ndarray]]:
    """What `api.Loss.towers` returns by tower: tower -> NAME -> array; a UserError where there are none, one is not
    whole, or they are not of `spec`.
    """
    towers: dict[str, dict] = {}
    for name, array in params.items():
        tower, _, own = name.partition("/")
        towers.setdefault(tower, {})[own or tower] = array
    shapes = {tower: {n: np.shape(a) for n, a in arrays.items()} for tower, arrays in towers.items()} or {"vision": {}}
    wrong = [f"{tower}/{n}" for tower in shapes for n in clip.misfits(tower, shapes[tower], spec)]
    if wrong:
        raise UserError(
            f"params are not those of whole towers of this backbone, they differ in {listing(sorted(wrong), 5)}: give "
            "what Loss.towers() returns"
        )
    return towers


def open_run(workdir: epath.PathLike, step: int | None = None) -> origins.ClipSource:
    """Opens the tuned model of a run, with both towers, at a step, by default the last.

    The source's `run` has the workdir, the step, the config, the files of each pretrained part ("sources"), the source
    of the initial weights ("base") and the names of the tuned towers ("tuned"). Its files are those of the initial
    weights, and the description of the checkpoint with the checksums of its arrays. A UserError where there is no such
    checkpoint, it has trained no parameter of a tower, or the initial weights are missing or have changed.
    """
    from diva_jax.training import workdirs  # The layer above, which only a run needs.

    run = workdirs.RunAt.open(workdir, step)
    spec = backbones.spec_of(run.config)
    base = origins.open_source(spec.source, "config.backbone.source")
    sha256 = readers.fingerprint(base.files)
    for prefix, part in run.program.objective.pretrained().items():
        began = run.sources.get(prefix)
        if part.source == spec.source and began and began["sha256"] != sha256:
            raise UserError(
                f"{base.where} is not the checkpoint that the run began with (sha256 {sha256[:12]}, "
                f"{began['sha256'][:12]} expected): put {listing(began['source'])} back"
            )
    towers = run.towers()
    tuned = sorted(t for t in towers if not run.program.towers.needs(t).isdisjoint(run.params))
    if not tuned:
        raise UserError(
            f"{workdir}, step {run.step}, has trained no parameter of {listing(sorted(towers))}, only "
            f"{listing(sorted(run.params), 3)}: export the weights that it began with, {base.where}"
        )
    described = paths.folder(workdir, "--workdir") / "checkpoints" / str(run.step) / "meta"
    try:
        files = [*base.files, *sorted(described.iterdir())]
    except FileNotFoundError as e:
        raise UserError(
            f"the checkpoint of step {run.step} in {workdir} was deleted while it was read, a run trains there: try "
            "again, or train with a larger config.checkpoint.keep"
        ) from e
    record = dict(
        workdir=str(workdir),
        step=run.step,
        config=json.loads(run.config.to_json()),
        sources=run.sources,
        base=base.where,
        tuned=tuned,
    )
    return origins.ClipSource(
        f"{workdir}, step {run.step}",
        "checkpoint",
        Tensors({**base.tensors, **in_open_clip_names(towers, spec)}, files),
        spec,
        tokenizer=base.tokenizer,
        run=record,
    )
