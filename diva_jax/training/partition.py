"""Modules as flat dicts of arrays: trained and frozen ones by a table of regular expressions, their shardings on the
mesh, and the tuned towers as functions of them, for evaluation and export.

The name of a parameter is its path in the module, joined by slashes (`vision/blocks/0/attn/qkv/kernel`). Train states,
optimizer states and checkpoints are dicts with these names as keys.
"""

import itertools
import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import mesh_utils
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from diva_jax.common.errors import UserError, listing
from diva_jax.common.fields import is_regex
from diva_jax.models.backbones import Spec
from diva_jax.weights import names

BATCH = P(("data", "fsdp"))
Flat = dict[str, dict[str, jax.Array]]  # Tower -> name of a parameter in it -> array.


def make_mesh(config, devices=None) -> Mesh:
    """A (`data`, `fsdp`) mesh of all devices, as `config.mesh` says, in an order in which neighbours are linked; a
    UserError where its sizes do not give their number."""
    devices = jax.devices() if devices is None else devices
    n, fsdp = len(devices), config.fsdp
    if fsdp < 1 or n % fsdp:
        raise UserError(f"config.mesh.fsdp={fsdp} does not divide the {n} devices of this run")
    data = n // fsdp if config.data == -1 else config.data
    if data * fsdp != n:
        raise UserError(f"config.mesh: data={config.data} x fsdp={fsdp}, but this run has {n} devices: use data=-1")
    # Unlike `jax.make_mesh`, this also has an order for an axis that is a part of a physical one, as fsdp=2 on v6e:4x4.
    return Mesh(mesh_utils.create_device_mesh((data, fsdp), devices, allow_split_physical_axes=True), ("data", "fsdp"))


def rows_here(mesh: Mesh, count: int) -> list[int]:
    """The rows of a batch of `count`, in order, that are on the devices of this process."""
    spans = NamedSharding(mesh, BATCH).addressable_devices_indices_map((count,)).values()
    return sorted({i for (span,) in spans for i in range(*span.indices(count))})


def parameter_shardings(arrays: Mapping, mesh: Mesh, min_shard: int) -> dict[str, NamedSharding]:
    """Returns name -> sharding for arrays, or anything else with a shape: split over `fsdp` along the largest axis that
    it divides, or replicated where there is none or the array has fewer than `min_shard` elements."""
    fsdp = mesh.shape["fsdp"]

    def spec(shape: tuple[int, ...]) -> P:
        axes = [i for i, n in enumerate(shape) if n % fsdp == 0]
        if fsdp == 1 or not axes or math.prod(shape) < min_shard:
            return P()
        longest = max(axes, key=lambda i: shape[i])
        return P(*["fsdp" if i == longest else None for i in range(len(shape))])

    return {n: NamedSharding(mesh, spec(a.shape)) for n, a in arrays.items()}


def name_of(path: tuple) -> str:
    """Returns the name of the parameter at a path."""
    return "/".join(str(p) for p in path)


class Skeleton(NamedTuple):
    """A module without its arrays: the graph of `nnx.split`, and name -> (path, variable without a value)."""

    graph: nnx.GraphDef
    variables: Mapping[str, tuple[tuple, nnx.Variable]]

    def merge(self, *arrays: Mapping[str, jax.Array]) -> nnx.Module:
        """Returns the module with these arrays, which must together have every parameter."""
        everything = {name: array for part in arrays for name, array in part.items()}
        state = {path: var.replace(everything[name]) for name, (path, var) in self.variables.items()}
        return nnx.merge(self.graph, nnx.from_flat_state(state))


def disassemble(module: nnx.Module) -> tuple[Skeleton, dict[str, jax.Array]]:
    """Splits a module into its skeleton and {name: array or ShapeDtypeStruct}."""
    graph, state = nnx.split(module)
    flat = {name_of(path): (path, var) for path, var in nnx.to_flat_state(state)}
    arrays = {name: var.get_value() for name, (_, var) in flat.items()}
    return Skeleton(graph, {name: (path, var.replace(None)) for name, (path, var) in flat.items()}), arrays


def scales(table: Iterable[tuple[str, float]], names: Iterable[str]) -> dict[str, float]:
    """Name -> learning-rate scale (0: frozen), by the first pattern that matches the whole name; a UserError where none
    matches a name, one matches no name or is invalid, or nothing is trained."""
    table = list(table)
    for pattern, _ in table:
        if not is_regex(pattern):
            raise UserError(f"config.trainable: {pattern!r} is not a regular expression")
    first = {n: next((i for i, row in enumerate(table) if re.fullmatch(row[0], n)), None) for n in names}
    if missed := [n for n, i in first.items() if i is None]:
        raise UserError(f"config.trainable matches no pattern for {listing(missed, 5)}: end the table with ('.*', 0.0)")
    for i, (pattern, _) in enumerate(table):
        # A catch-all pattern may be unused; any other unused pattern is a typing error.
        if i not in first.values() and pattern != ".*":
            problem = f"the pattern {pattern!r} matches no parameter (or earlier patterns match all of them)"
            raise UserError(f"config.trainable: {problem}; parameters are named like {listing(list(first)[:3])}")
    found = {n: float(table[i][1]) for n, i in first.items()}
    if not any(found.values()):
        raise UserError("config.trainable trains nothing: give at least one pattern a scale above 0")
    return found


def summary(arrays: Mapping[str, jax.ShapeDtypeStruct], trained: Iterable[str]) -> str:
    """Returns a table by part (first name component): numbers of trained and frozen parameters, and memory."""
    trained = set(trained)
    rows: dict[str, list[int]] = {}
    for name, a in arrays.items():
        row = rows.setdefault(name.split("/")[0], [0, 0, 0])
        row[0 if name in trained else 1] += a.size
        row[2] += a.size * jnp.dtype(a.dtype).itemsize
    rows["total"] = [sum(r[i] for r in rows.values()) for i in range(3)]
    lines = [f"{'part':<14}{'trained':>15}{'frozen':>15}{'MiB':>10}"]
    lines += [f"{part:<14}{t:>15,}{f:>15,}{b / 2**20:>10,.1f}" for part, (t, f, b) in rows.items()]
    return "\n".join(lines)


def _leaves(skeleton: Skeleton, arrays: Mapping[str, jax.Array]) -> Flat:
    """Returns `Objective.towers`, each as a flat dict; in that of a bare variable (logit_scale) the key is its name."""
    found = skeleton.merge(arrays).towers()
    return {t: disassemble(m)[1] if isinstance(m, nnx.Module) else {t: m.get_value()} for t, m in found.items()}


class Towers:
    """The towers of an objective, traced once: `shapes` has tower -> name -> ShapeDtypeStruct. Most parameters of a
    tower are parameters of the objective under another name; others (merged adapters) are computed from several.
    Tracing `Objective.towers` shows which parameters each of them needs."""

    def __init__(self, skeleton: Skeleton, arrays: Mapping[str, jax.ShapeDtypeStruct]):
        self._skeleton = skeleton
        self._abstract = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in sorted(arrays.items())}
        traced, self.shapes = jax.make_jaxpr(lambda a: _leaves(skeleton, a), return_shape=True)(self._abstract)
        self._traced = traced.jaxpr
        inputs = {id(var): name for var, name in zip(self._traced.invars, self._abstract, strict=True)}
        paths = jax.tree_util.tree_leaves_with_path(self.shapes)
        self._leaves = [(tower.key, name.key) for (tower, name), _ in paths]
        # Leaves that are an unchanged parameter.
        results = zip(self._leaves, self._traced.outvars, strict=True)
        self._same = {leaf: inputs[id(var)] for leaf, var in results if id(var) in inputs}

    def check(self, spec: Spec) -> None:
        """A UserError where a tower has other names or shapes than that of the backbone `spec`, or is not known."""
        for tower, shapes in self.shapes.items():
            if tower not in (*names.TOWERS, *names.SCALARS):
                raise UserError(f"towers() returns {tower!r}: return only vision, text, logit_scale and logit_bias")
            if wrong := names.misfits(tower, {n: a.shape for n, a in shapes.items()}, spec):
                problem = f"the {tower} tower of the objective is not that of config.backbone"
                advice = "towers() must return the plain tower, with adapters merged"
                raise UserError(f"{problem}, they differ in {listing(wrong, 5)}: {advice}")

    def needs(self, tower: str) -> frozenset[str]:
        """Returns the names of the objective's parameters that a tower is computed from."""
        return frozenset(self._inputs([leaf for leaf in self._leaves if leaf[0] == tower]))

    def _inputs(self, leaves: Collection[tuple[str, str]]) -> list[str]:
        """The names of the parameters that some leaves are computed from, in order."""
        _, used = dce_jaxpr(self._traced, [leaf in leaves for leaf in self._leaves])
        return list(itertools.compress(self._abstract, used))

    def __call__(self, arrays: Mapping[str, jax.Array]) -> Flat:
        """The towers of these parameters: tower -> name -> array, for an unchanged parameter the given array. `arrays`
        has at least those that `needs` names, on devices or on the host."""
        found = {leaf: arrays[name] for leaf, name in self._same.items()}
        if computed := [leaf for leaf in self._leaves if leaf not in self._same]:

            def compute(given):
                rest = {n: jnp.zeros(a.shape, a.dtype) for n, a in self._abstract.items() if n not in given}
                towers = _leaves(self._skeleton, {**rest, **given})
                return [towers[tower][name] for tower, name in computed]

            found |= zip(computed, jax.jit(compute)({n: arrays[n] for n in self._inputs(computed)}), strict=True)
        return {t: {name: found[t, name] for tower, name in self._leaves if tower == t} for t in self.shapes}
