"""The mesh, and the sharding of each array on it."""

import math
from collections.abc import Mapping

import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from diva_jax.common.errors import UserError

BATCH = P(("data", "fsdp"))


def make_mesh(config, devices=None) -> Mesh:
    """A (`data`, `fsdp`) mesh of all devices, as `config.mesh` says, in an order in which neighbours are linked; a
    UserError where its sizes do not give their number.
    """
    devices = jax.devices() if devices is None else devices
    n, fsdp = len(devices), config.fsdp
    if fsdp < 1 or n % fsdp:
        raise UserError(f"config.mesh.fsdp={fsdp} does not divide the {n} devices of this run")
    data = n // fsdp if config.data == -1 else config.data
    if data * fsdp != n:
        raise UserError(
            f"config.mesh.data={config.data} x fsdp={fsdp} is {data * fsdp} devices, but this run has {n}: "
            f"use data=-1 or {n // fsdp}"
        )
    # Unlike `jax.make_mesh`, this also has an order for an axis that is a part of a physical one, as fsdp=2 on v6e:4x4.
    ordered = mesh_utils.create_device_mesh((data, fsdp), devices, allow_split_physical_axes=True)
    return Mesh(ordered, ("data", "fsdp"))


def parameter_spec(shape: tuple[int, ...], fsdp: int, min_shard: int) -> P:
    """Returns the partition of an array: split over `fsdp` along its largest divisible axis, or replicated if small."""
    axes = [i for i, n in enumerate(shape) if n % fsdp == 0]
    if fsdp == 1 or not axes or math.prod(shape) < min_shard:
        return P()
    longest = max(axes, key=lambda i: shape[i])
    return P(*(["fsdp" if i == longest else None for i in range(len(shape))]))


def parameter_shardings(arrays: Mapping, mesh: Mesh, min_shard: int) -> dict[str, NamedSharding]:
    """Returns name -> sharding for arrays, or anything else with a shape."""
    fsdp = mesh.shape["fsdp"]
    return {n: NamedSharding(mesh, parameter_spec(a.shape, fsdp, min_shard)) for n, a in arrays.items()}


def like_parameters(tree, shardings: Mapping[str, NamedSharding], mesh: Mesh):
    """Returns the shardings of an optimizer state: a leaf whose last key is a parameter's name has its sharding."""

    def of(path, leaf):
        key = getattr(path[-1], "key", None) if path else None
        if leaf.ndim and key in shardings:
            return shardings[key]
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(of, tree)


def with_shardings(tree, shardings):
    """Returns a tree of ShapeDtypeStructs with these shardings."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)
