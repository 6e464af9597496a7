"""The initial arrays of a program: pretrained parts from their sources, each array placed directly on its sharding."""

import re
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from flax import nnx

from diva_jax.common.errors import UserError, listing
from diva_jax.training import partition
from diva_jax.training.step import Program
from diva_jax.weights import readers
from diva_jax.weights.parts import Opened


def put_on(sharding: Callable[[tuple], jax.sharding.Sharding]) -> Callable:
    """Returns a `put` for `names.assign`; each process provides only the shards of its own devices."""

    def put(path, array: np.ndarray, want: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.make_array_from_callback(want.shape, sharding(path), lambda index: array[index])

    return put


def owners(program: Program) -> dict[str, str]:
    """Parameter name -> prefix of its pretrained part; other parameters keep their initial values."""
    found = {}
    parts = program.objective.pretrained()
    for prefix in sorted(parts, key=len):  # The longest prefix is applied last and takes precedence.
        names = [n for n in program.arrays if n == prefix or n.startswith(prefix + "/")]
        if not names:
            raise UserError(
                f"config.objective={program.config.objective}: pretrained() has {prefix!r}, but parameters are named "
                f"like {listing(list(program.arrays)[:3])}"
            )
        for name in names:
            found[name] = prefix
            if any(re.fullmatch(pattern, name[len(prefix) + 1 :]) for pattern in parts[prefix].fresh):
                del found[name]
    return found


def _fill(program: Program, prefix: str, opened: Opened, mine: list[str], wanted: set[str]) -> dict:
    """{name: array} of the wanted parameters of one part."""
    depth = prefix.count("/") + 1
    paths = {n: program.skeleton.variables[n][0] for n in mine}
    names = {path[depth:] or path: n for n, path in paths.items()}
    variables = {p: program.skeleton.variables[n][1].replace(program.arrays[n]) for p, n in names.items()}
    place = put_on(lambda path: program.shardings[names[path]])

    def put(path, array, want):
        return place(path, array, want) if names[path] in wanted else None

    state = opened.fill(nnx.from_flat_state(variables), put)
    return {names[path]: var.get_value() for path, var in nnx.to_flat_state(state)}


def initial_arrays(
    program: Program, only: Collection[str] | None = None, every_source: bool = True
) -> tuple[dict, dict]:
    """Loads the arrays `only` (default all): pretrained parts from their sources, others as the objective initialises
    them.

    Returns ({name: array on its sharding}, {prefix: {"source": names of files, "sha256"}}). A part of which some are
    loaded is checked as a whole; with `every_source` sources of which nothing is loaded are found and hashed too. A
    UserError where a source is missing, invalid, or of another architecture.
    """
    wanted = set(program.arrays if only is None else only)
    owner, parts = owners(program), program.objective.pretrained()
    mine = {prefix: [n for n, p in owner.items() if p == prefix] for prefix in parts}
    needed = [prefix for prefix in parts if not wanted.isdisjoint(mine[prefix])]
    # All sources are found and checked before any values are read.
    opened = {prefix: parts[prefix].open() for prefix in (parts if every_source else needed)}
    arrays = {}
    with ThreadPoolExecutor(1) as hashes:
        # Hashing needs the processor while reading waits for the disk.
        digests = {prefix: hashes.submit(readers.fingerprint, o.files) for prefix, o in opened.items()}
        for prefix in needed:
            arrays |= _fill(program, prefix, opened[prefix], mine[prefix], wanted)
        if fresh := [n for n in program.arrays if n not in owner and n in wanted]:
            arrays |= _initialise(program, fresh)
        names = {prefix: [f.name for f in o.files] for prefix, o in opened.items()}
        origins = {prefix: {"source": names[prefix], "sha256": digests[prefix].result()} for prefix in opened}
    return {n: a for n, a in arrays.items() if n in wanted}, origins


def _initialise(program: Program, fresh: list[str]) -> dict:
    """The initial values of these parameters; the compiler removes the computation of all others."""

    def init():
        _, arrays = partition.disassemble(program.init_module())
        return {n: arrays[n] for n in fresh}

    return jax.jit(init, out_shardings={n: program.shardings[n] for n in fresh})()
