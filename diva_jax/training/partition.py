"""Which parameters are trained: a regex table, total, printed; and a module as flat dicts of arrays.

Parameters are known by name: their path in the module, joined by slashes
(`vision/blocks/0/attn/qkv/kernel`). A train state, an optimizer state and a checkpoint are dicts by that name.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diva_jax.common.errors import UserError, listing


def name_of(path: tuple) -> str:
    return "/".join(str(p) for p in path)


class Skeleton(NamedTuple):
    """A module without its arrays: what makes `{name: array}` a module again.

    Attributes:
      graph: from `nnx.split`.
      variables: name -> (path, variable without value).
    """

    graph: nnx.GraphDef
    variables: Mapping[str, tuple[tuple, nnx.Variable]]

    def merge(self, *arrays: Mapping[str, jax.Array]) -> nnx.Module:
        """The module of these arrays, which together name every parameter once."""
        everything = {}
        for part in arrays:
            everything.update(part)
        state = {path: var.replace(everything[name]) for name, (path, var) in self.variables.items()}
        return nnx.merge(self.graph, nnx.from_flat_state(state))


def disassemble(module: nnx.Module) -> tuple[Skeleton, dict[str, jax.Array]]:
    """Module -> (skeleton, {name: array or ShapeDtypeStruct})."""
    graph, state = nnx.split(module)
    flat = {name_of(path): (path, var) for path, var in nnx.to_flat_state(state)}
    arrays = {name: var.get_value() for name, (_, var) in flat.items()}
    bare = {name: (path, var.replace(None)) for name, (path, var) in flat.items()}
    return Skeleton(graph, bare), arrays


def scales(table: Iterable[tuple[str, float]], names: Iterable[str]) -> dict[str, float]:
    """Name -> learning-rate scale (0: frozen); the first pattern that matches the whole name wins.

    Raises:
      UserError: a name that no pattern matches, or a pattern that matches no name.
    """
    table, names = list(table), list(names)
    out, used = {}, set()
    for name in names:
        for i, (pattern, scale) in enumerate(table):
            try:
                hit = re.fullmatch(pattern, name)
            except re.error as e:
                raise UserError(f"config.trainable: {pattern!r} is no regular expression ({e})") from e
            if hit:
                out[name] = float(scale)
                used.add(i)
                break
    if missed := [n for n in names if n not in out]:
        raise UserError(f"config.trainable matches no pattern for {listing(missed, 5)}: end the table with ('.*', 0.0)")
    for i, (pattern, _) in enumerate(table):
        # A last catch-all may be left with nothing; any other idle pattern is a typing error.
        if i not in used and pattern != ".*":
            raise UserError(
                f"config.trainable: the pattern {pattern!r} matches no parameter (or earlier patterns took all "
                f"of them); parameters are named like {listing(names[:3])}"
            )
    if not any(out.values()):
        raise UserError("config.trainable trains nothing: give at least one pattern a scale above 0")
    return out


def summary(arrays: Mapping[str, jax.ShapeDtypeStruct], trained: Iterable[str]) -> str:
    """A table by part (first name component): parameters trained and frozen, and bytes."""
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
