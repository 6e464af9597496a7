"""Trained and frozen parameters by a table of regular expressions, and modules as flat dicts of arrays.

The name of a parameter is its path in the module, joined by slashes (`vision/blocks/0/attn/qkv/kernel`). Train states,
optimizer states and checkpoints are dicts with these names as keys.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diva_jax.common.errors import UserError, listing


def name_of(path: tuple) -> str:
    """Returns the name of the parameter at a path."""
    return "/".join(str(p) for p in path)


class Skeleton(NamedTuple):
    """A module without its arrays: the graph of `nnx.split`, and name -> (path, variable without a value)."""

    graph: nnx.GraphDef
    variables: Mapping[str, tuple[tuple, nnx.Variable]]

    def merge(self, *arrays: Mapping[str, jax.Array]) -> nnx.Module:
        """Returns the module with these arrays, which must together have every parameter."""
        everything = {}
        for part in arrays:
            everything.update(part)
        state = {path: var.replace(everything[name]) for name, (path, var) in self.variables.items()}
        return nnx.merge(self.graph, nnx.from_flat_state(state))


def disassemble(module: nnx.Module) -> tuple[Skeleton, dict[str, jax.Array]]:
    """Splits a module into its skeleton and {name: array or ShapeDtypeStruct}."""
    graph, state = nnx.split(module)
    flat = {name_of(path): (path, var) for path, var in nnx.to_flat_state(state)}
    arrays = {name: var.get_value() for name, (_, var) in flat.items()}
    bare = {name: (path, var.replace(None)) for name, (path, var) in flat.items()}
    return Skeleton(graph, bare), arrays


def scales(table: Iterable[tuple[str, float]], names: Iterable[str]) -> dict[str, float]:
    """Name -> learning-rate scale (0: frozen), by the first pattern that matches the whole name; a UserError where none
    matches a name, one matches no name or is invalid, or nothing is trained.
    """
    table, names = list(table), list(names)
    out, used = {}, set()
    for name in names:
        for i, (pattern, scale) in enumerate(table):
            try:
                hit = re.fullmatch(pattern, name)
            except re.error as e:
                raise UserError(f"config.trainable: {pattern!r} is not a regular expression ({e})") from e
            if hit:
                out[name] = float(scale)
                used.add(i)
                break
    if missed := [n for n in names if n not in out]:
        raise UserError(f"config.trainable matches no pattern for {listing(missed, 5)}: end the table with ('.*', 0.0)")
    for i, (pattern, _) in enumerate(table):
        # A catch-all pattern may be unused; any other unused pattern is a typing error.
        if i not in used and pattern != ".*":
            raise UserError(
                f"config.trainable: the pattern {pattern!r} matches no parameter (or earlier patterns match all "
                f"of them); parameters are named like {listing(names[:3])}"
            )
    if not any(out.values()):
        raise UserError("config.trainable trains nothing: give at least one pattern a scale above 0")
    return out


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
