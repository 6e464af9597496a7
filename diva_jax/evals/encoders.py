"""The encoders of an evaluation: any source of weights, or the workdir of a run at a step."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax
from jax.sharding import Mesh

from diva_jax.models import backbones
from diva_jax.models.backbones import Spec
from diva_jax.training import load as loads
from diva_jax.training import partition, sharding, workdirs
from diva_jax.weights import clip, loading, names, origins, places


@dataclasses.dataclass(frozen=True)
class Encoder:
    """One set of weights: parameters, name -> array on the mesh, of the vision tower and, if a run has trained it, of
    the text tower, else None.

    `source` is that of the text tower and the tokenizer, `base` that of the vision tower that a run began with, or of
    these weights themselves. `params` are the objective's parameters that a run has trained, and `borrowed` is the
    label of that run where it is another one.
    """

    vision: Mapping[str, jax.Array]
    text: Mapping[str, jax.Array] | None
    source: str
    params: Mapping[str, jax.Array]
    base: str
    borrowed: str = ""


def tower(kind: str, source: str, spec: Spec, mesh: Mesh, min_shard: int) -> dict[str, jax.Array]:
    """The parameters of one tower, "vision" or "text", of a source: name -> array on the mesh; smaller arrays than
    `min_shard` are replicated. A UserError where it is missing, invalid, or of another architecture."""
    opened = loading.open_tower(kind, origins.open_source(source, "--weights"), spec)
    module = clip.abstract(kind, spec)
    shardings = sharding.parameter_shardings(names.flat(module), mesh, min_shard)
    state = opened.fill(module, loads.put_on(shardings.__getitem__))
    return {partition.name_of(path): var.get_value() for path, var in names.flat(state).items()}


def put(arrays: Mapping[str, jax.Array], mesh: Mesh, min_shard: int) -> dict[str, jax.Array]:
    """Places the parameters of a tower on the mesh; arrays with fewer than `min_shard` elements are replicated."""
    shardings = sharding.parameter_shardings(arrays, mesh, min_shard)
    return {n: jax.device_put(a, shardings[n]) for n, a in arrays.items()}


def read(source: str, step: int | None, config, mesh: Mesh) -> Encoder:
    """Loads the weights of a source onto the mesh; source and step are as `places.find` has them. The config's backbone
    must be that of the source, and has the text tower if the source has none."""
    if step is not None:  # Parameters that the run does not train are those of its initial source.
        run = workdirs.RunAt.open(source, step)
        spec, wanted = backbones.spec_of(run.config), backbones.spec_of(config)
        fields = (*origins.ARCHITECTURE, "image_size")
        origins.check_same(vars(spec), wanted, fields, f"the run {source}", "config.backbone")
        min_shard = run.config.mesh.min_shard
        towers = {kind: put(arrays, mesh, min_shard) for kind, arrays in run.towers().items() if kind in clip.TOWERS}
        params = put(run.params, mesh, min_shard)
        return Encoder(towers["vision"], towers.get("text"), spec.source, params, spec.source)
    vision = tower("vision", source, backbones.spec_of(config), mesh, config.mesh.min_shard)
    text = source if origins.open_source(source, "--weights").has_text else config.backbone.source
    return Encoder(vision, None, text, {}, source)


def each(given: Sequence[places.Place], labels: Sequence[str], config, mesh: Mesh) -> Iterator[tuple[str, Encoder]]:
    """Yields (label, encoder) for several sources, loaded one at a time. Sources that are not runs borrow the
    parameters outside the towers (`visual_proj/...`) that the first run among them has trained, so that the scores
    before and after tuning use the same parameters."""
    lender = next((i for i, place in enumerate(given) if place.step is not None), None)
    lent: dict[str, jax.Array] = {}
    if lender is not None and any(place.step is None for place in given):
        run = workdirs.RunAt.open(given[lender].source, given[lender].step)
        own = set().union(*(run.program.towers.needs(t) for t in run.program.towers.shapes))
        lent = put({n: a for n, a in run.params.items() if n not in own}, mesh, run.config.mesh.min_shard)
    for place, label in zip(given, labels, strict=True):
        encoder = read(place.source, place.step, config, mesh)
        if lent and place.step is None:
            encoder = dataclasses.replace(encoder, params=lent, borrowed=labels[lender])
        yield label, encoder
        del encoder  # Its memory is free while the next is loaded.
