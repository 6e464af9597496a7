"""What an evaluation may be of: any source of weights, or a run's workdir at a step."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
from etils import epath
from jax.sharding import Mesh

from diva_jax.common import paths
from diva_jax.common.errors import UserError, listing
from diva_jax.export import workdirs
from diva_jax.models import backbones
from diva_jax.models.backbones import Spec, spec_of
from diva_jax.models.backbones.shared.text import Text
from diva_jax.models.layers import abstract
from diva_jax.training import checkpoint, partition, sharding
from diva_jax.weights import loading, names, parts, sources


@dataclasses.dataclass(frozen=True)
class Weights:
    """One set of weights.

    Attributes:
      arrays: name -> array on the mesh: `vision/...` and, of a workdir, all that its run trains.
      text: the source whose text tower and tokenizer belong to it.
      borrowed: whose those of `arrays` are that the source itself lacks; empty: nobody's.
    """

    arrays: Mapping[str, jax.Array]
    text: str
    borrowed: str = ""


def is_workdir(source: str) -> bool:
    path = paths.folder(source, "--weights")
    return (path / "config.json").exists() and (path / "checkpoints").is_dir()


def resolve(source: str) -> tuple[str, int | None]:
    """`"runs/a:400"` -> ("runs/a", 400), `"runs/a"` -> ("runs/a", its last step), others -> (source, None).

    Raises:
      UserError: a workdir without this checkpoint, or a source that cannot be.
    """
    head, _, tail = source.rpartition(":")
    path, step = (head, int(tail)) if tail.isdigit() and is_workdir(head) else (source, None)
    if not is_workdir(path):
        sources.locate(source, "--weights")
        return source, None
    steps = checkpoint.steps(epath.Path(path).expanduser())
    if not steps or (step is not None and step not in steps):
        which = f"no checkpoint of step {step}, only of {listing(steps)}" if steps else "no checkpoint yet"
        raise UserError(f"{path} has {which}: name a step that exists, as {path}:STEP")
    return path, steps[-1] if step is None else step


def _tower(build: Callable, fill: Callable, source, spec: Spec, mesh: Mesh, min_shard: int) -> dict[str, jax.Array]:
    """Name -> array of one tower, each straight to its sharding; `fill` is of `weights.loading`."""
    module = abstract(lambda rngs: build(spec, rngs=rngs))
    shardings = {
        path: sharding.parameter_shardings({path: var}, mesh, min_shard)[path]
        for path, var in names.flat(module).items()
    }
    state = fill(source, spec, module, parts.put_on(shardings.__getitem__))
    return {partition.name_of(path): var.get_value() for path, var in names.flat(state).items()}


def vision(source: str, spec: Spec, mesh: Mesh, min_shard: int) -> dict[str, jax.Array]:
    """The vision tower's arrays, named `vision/...`.

    Raises:
      UserError: the source is missing, broken, or of another architecture.
    """
    opened = sources.open_clip_source(source, "--weights")
    found = _tower(backbones.build, loading.fill_vision, opened, spec, mesh, min_shard)
    return {f"vision/{name}": array for name, array in found.items()}


def text(source: str, spec: Spec, mesh: Mesh, min_shard: int) -> tuple[dict[str, jax.Array], Path]:
    """(the text tower's arrays, the folder that should have its tokenizer).

    Raises:
      UserError: the source is missing or broken, or has no such text tower.
    """
    opened = sources.open_clip_source(source, "--weights")
    where = Path(opened.where)
    folder = where if where.is_dir() else where.parent
    return _tower(Text, loading.fill_text, opened, spec, mesh, min_shard), folder


def _has_text(source: str) -> bool:
    return any(n.endswith("token_embedding.weight") for n in sources.open_clip_source(source, "--weights").tensors)


def _trained(folder: epath.Path, step: int, run, mesh: Mesh, wanted: Callable[[str], bool] = lambda name: True) -> dict:
    """What a run has trained, name -> array, or as much of it as is wanted."""
    checkpoints = checkpoint.Checkpoints(folder)
    try:
        saved = {n: a for n, a in checkpoints.trained(step).items() if wanted(n)}
        shardings = sharding.parameter_shardings(saved, mesh, run.mesh.min_shard)
        return checkpoints.restore_params(step, sharding.with_shardings(saved, shardings))[0] if saved else {}
    finally:
        checkpoints.close()


def _workdir(source: str, step: int, config, mesh: Mesh) -> Weights:
    """The encoder of a run; what the run does not train comes from the source it began with."""
    folder = epath.Path(source).expanduser()
    run = workdirs.config_of(folder)
    spec, wanted = spec_of(run), spec_of(config)
    if wrong := [f for f in (*sources.ARCHITECTURE, "image_size") if getattr(spec, f) != getattr(wanted, f)]:
        raise UserError(f"{source} is a run of another backbone than --config ({listing(wrong)}): give its own config")
    arrays = _trained(folder, step, run, mesh)
    tower = abstract(lambda rngs: backbones.build(spec, rngs=rngs))
    idle = [n for path in names.flat(tower) if (n := f"vision/{partition.name_of(path)}") not in arrays]
    if idle:
        original = vision(run.backbone.source, spec, mesh, run.mesh.min_shard)
        arrays = {n: original[n] for n in idle} | arrays
    return Weights(arrays, run.backbone.source)


def load(source: str, step: int | None, config, mesh: Mesh) -> Weights:
    """The weights of a source, on the mesh.

    Args:
      source, step: as `resolve` gives them: a workdir and its step, or whatever `weights.load` reads and None.
      config: says which backbone this must be, and from where the text tower comes if the source has none.
      mesh: where the arrays go.

    Raises:
      UserError: the source is missing, broken, or of another architecture.
    """
    if step is not None:
        return _workdir(source, step, config, mesh)
    arrays = vision(source, spec_of(config), mesh, config.mesh.min_shard)
    return Weights(arrays, source if _has_text(source) else config.backbone.source)


def each(
    given: Sequence[tuple[str, int | None]], labels: Sequence[str], config, mesh: Mesh
) -> Iterator[tuple[str, Weights]]:
    """(label, weights) of several sources, loaded one at a time.

    Weights that are no run's borrow what the first run among them has trained beside its vision tower
    (`visual_proj/...`), so that before and after tuning are judged with the same.

    Args:
      given: (source, step) as `resolve` gives them.
      labels: of each.
      config, mesh: as for `load`.

    Raises:
      UserError: as `load`.
    """
    lender = next((i for i, (_, step) in enumerate(given) if step is not None), None)
    lent = {}
    if lender is not None and any(step is None for _, step in given):
        folder = epath.Path(given[lender][0]).expanduser()
        run = workdirs.config_of(folder)
        lent = _trained(folder, given[lender][1], run, mesh, lambda name: not name.startswith("vision/"))
    for (source, step), label in zip(given, labels, strict=True):
        found = load(source, step, config, mesh)
        if lent and step is None:
            found = Weights({**lent, **found.arrays}, found.text, labels[lender])
        yield label, found
        del found  # Not held while the next is loaded.
