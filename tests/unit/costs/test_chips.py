"""Tests of the table of chips, the names of topologies, and the time of an all-reduce."""

import math
from types import SimpleNamespace

import pytest

from diva_jax.common.errors import UserError
from diva_jax.costs import chips

# Matrix units per device, cores x units per core; those of a TPU7x count twice, as its peak and its clock imply.
UNITS = {"v4": 2 * 4, "v5e": 4, "v5p": 2 * 4, "v6e": 4, "tpu7x": 2 * 2}


@pytest.mark.parametrize("name", chips.CHIPS)
def test_the_numbers_of_a_chip_agree(name):
    """Two FLOPs per element and cycle of the matrix units give the published peak; most of the memory is usable."""
    chip = chips.CHIPS[name]
    assert 2 * UNITS[name] * chip.matrix_side**2 * chip.clock == pytest.approx(chip.flops, rel=0.005)
    assert 0.95 * chip.hbm < chip.usable < 1.01 * chip.hbm


def test_the_peak_is_found_by_device_kind():
    peaks = {"TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "NVIDIA H100 80GB HBM3": 989e12}
    for kind, peak in peaks.items():
        assert chips.of(SimpleNamespace(device_kind=kind)).flops == chips.of(kind).flops == peak
    assert chips.of(SimpleNamespace(device_kind="cpu")) is None


def test_topologies():
    assert chips.parse_topology("v5e:4x4") == ("v5e", chips.CHIPS["v5e"], (4, 4))
    assert chips.parse_topology("v4:2x2x4")[2] == (2, 2, 4)
    assert chips.parse_topology("tpu7x:2x2x1") == ("tpu7x", chips.of("TPU7x"), (2, 2, 1))
    for bad in ("v5e", "v5e:4", "tpu7x:4x4", "v5e:4x4x4", "v4:4x4", "v5e:axb", "v5e:0x4", "v9:4x4", "4x4"):
        with pytest.raises(UserError, match=bad):
            chips.parse_topology(bad)


def test_time_of_an_all_reduce():
    chip, gb = chips.CHIPS["v5e"], 1e9
    assert chips.all_reduce_seconds(gb, chip, (1, 1)) == 0
    # A whole pod is a torus: each chip sends 2 x 255/256 GB over all its links.
    assert chips.all_reduce_seconds(gb, chip, (16, 16)) == pytest.approx(2 * gb * 255 / 256 / chip.ici)
    # An axis without wrap-around links has half of the bandwidth, and an axis of one chip has none.
    assert chips.all_reduce_seconds(gb, chip, (4, 4)) == pytest.approx(2 * gb * 15 / 16 / (chip.ici / 2))
    assert chips.all_reduce_seconds(gb, chip, (1, 4)) == pytest.approx(2 * gb * 3 / 4 / (chip.ici / 4))
    # With three axes, only slices of whole cubes of 4 x 4 x 4 chips are tori.
    for name in ("v4", "v5p", "tpu7x"):
        chip = chips.CHIPS[name]
        assert chips.all_reduce_seconds(gb, chip, (4, 4, 8)) == pytest.approx(2 * gb * 127 / 128 / chip.ici)
        assert chips.all_reduce_seconds(gb, chip, (2, 2, 4)) == pytest.approx(2 * gb * 15 / 16 / (chip.ici / 2))
    assert math.isclose(chips.all_reduce_seconds(2 * gb, chip, (4, 4)), 2 * chips.all_reduce_seconds(gb, chip, (4, 4)))
