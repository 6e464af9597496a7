"""Checks of the mesh's sizes, and the sharding rules."""

import jax
import numpy as np
import pytest
import small
from jax.sharding import PartitionSpec as P

from diva_jax import config
from diva_jax.common.errors import UserError
from diva_jax.training import sharding


def mesh_config(**fields):
    c = config.default().mesh
    c.update(fields)
    return c


@pytest.mark.parametrize(
    "fields, shape", [({}, (8, 1)), ({"fsdp": 4}, (2, 4)), ({"data": 1, "fsdp": 8}, (1, 8)), ({"data": 8}, (8, 1))]
)
def test_mesh_covers_all_devices(fields, shape):
    mesh = sharding.make_mesh(mesh_config(**fields))
    assert tuple(mesh.shape.items()) == (("data", shape[0]), ("fsdp", shape[1]))


@pytest.mark.parametrize(
    "fields, said",
    [({"fsdp": 3}, "does not divide the 8 devices"), ({"data": 4}, "this run has 8"), ({"fsdp": 0}, "0")],
)
def test_mesh_that_does_not_divide(fields, said):
    with pytest.raises(UserError, match=said):
        sharding.make_mesh(mesh_config(**fields))


@pytest.mark.parametrize(
    "shape, spec",
    [
        ((6, 8), P(None, "fsdp")),
        ((12, 8), P("fsdp", None)),
        ((3, 3, 5, 20), P(None, None, None, "fsdp")),
        ((7, 9), P()),  # No axis divides.
        ((2, 4), P()),  # Too small.
        ((), P()),
    ],
)
def test_the_largest_axis_that_divides_is_split(shape, spec):
    assert sharding.parameter_spec(shape, 4, 30) == spec
    assert sharding.parameter_spec(shape, 1, 0) == P()


def test_optimizer_state_lies_as_its_parameters_and_bytes_per_device_fall():
    c = small.small_config(mesh__fsdp=8, mesh__min_shard=64)
    p = small.program(c, 8)
    state = p.abstract_state(0)
    leaves = jax.tree_util.tree_leaves_with_path(state["opt"])
    split = 0
    for path, leaf in leaves:
        key = getattr(path[-1], "key", None)
        if leaf.ndim and key in p.shardings:
            assert leaf.sharding == p.shardings[key], path
            split += "fsdp" in leaf.sharding.spec
    assert split > 10

    def held(a):
        return np.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize

    whole = sum(a.size * a.dtype.itemsize for a in p.arrays.values())
    assert sum(held(a) for a in p.arrays.values()) < whole / 3
