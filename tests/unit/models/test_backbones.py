"""The interface of architectures, and properties of their results, without other libraries."""

import dataclasses

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from specs import EVA02, METACLIP2, TOWERS

from diva_jax.common.errors import UserError
from diva_jax.models import backbones
from diva_jax.models.backbones.eva02 import rotary_table
from diva_jax.models.backbones.shared.text import Text
from diva_jax.models.layers import Keys
from diva_jax.models.names import Table

CONTRACT = "Vision flops MARK VISION TEXT positions OTHERS shapes PREPROCESS TIMM TRANSFORMERS"


def test_every_module_of_the_package_is_a_whole_architecture():
    found = backbones.architectures()
    assert set(found) == {spec.arch for spec in TOWERS.values()}
    for name, module in found.items():
        assert not [part for part in [*CONTRACT.split(), "LIBRARY"] if not hasattr(module, part)], name
        assert isinstance(module.VISION, Table) and (module.TEXT is None or isinstance(module.TEXT, Table))
    marks = [module.MARK for module in found.values()]
    assert len(set(marks)) == len(marks)


@pytest.mark.parametrize("spec", TOWERS.values(), ids=TOWERS)
def test_a_spec_comes_back_from_its_config(spec):
    """Specs have only plain fields, which flags and JSON can represent."""
    config = ConfigDict({"backbone": dataclasses.asdict(spec)})
    assert backbones.spec_of(ConfigDict(config.to_dict())) == spec
    values = [*dataclasses.asdict(spec).values(), *dataclasses.asdict(spec.text).values()]
    assert all(isinstance(v, (str, int, float, bool, tuple, dict)) for v in values)


@pytest.mark.parametrize("spec", TOWERS.values(), ids=TOWERS)
def test_flops_are_linear_in_depth(spec):
    one, two, four = (backbones.architecture(spec.arch).flops(dataclasses.replace(spec, layers=n)) for n in (1, 2, 4))
    assert 0 < two - one == pytest.approx((four - two) / 2)


def test_rotary_embeddings_turn_by_the_distance_alone():
    """The product of a rotated query and key depends only on the distance of their patches."""
    grid, width = 5, 12
    sin, cos = rotary_table(grid, width)
    assert sin.shape == (1 + grid * grid, width) and not sin[0].any() and (cos[0] == 1).all()
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, width))

    def turned(x, at):
        other = np.stack([-x[1::2], x[::2]], -1).reshape(-1)
        return x * cos[at] + other * sin[at]

    def score(a, b):
        return turned(q, 1 + a[0] * grid + a[1]) @ turned(k, 1 + b[0] * grid + b[1])

    for row, column in rng.integers(0, 3, (20, 2)):
        moved = score((row, column), (row + 2, column + 1))
        assert moved == pytest.approx(score((0, 0), (2, 1)))
    assert score((0, 0), (2, 1)) != pytest.approx(score((0, 0), (1, 2)))


def test_eos_pooling_ignores_what_follows_the_end():
    text = Text(METACLIP2, rngs=Keys(0))
    ids = np.array([[5, 60, 100, 7, 2, 1, 1, 1, 1, 1, 1, 1, 1], [5, 60, 100, 7, 2, 9, 2, 100, 4, 3, 2, 1, 1]])
    first, second = jax.jit(text.encode)(ids)
    np.testing.assert_allclose(first, second, rtol=1e-5)
    other = jax.jit(text.encode)(np.where(ids == 60, 61, ids))
    assert np.abs(other[0] - first).max() > 1e-3


def test_a_text_tower_has_its_own_activation():
    spec = dataclasses.replace(EVA02, text=dataclasses.replace(EVA02.text, activation=""))
    ids = np.arange(13)[None]
    a, b = (jax.jit(Text(s, rngs=Keys(0)).encode)(ids) for s in (EVA02, spec))
    assert np.abs(a - b).max() > 1e-4
    with pytest.raises(UserError, match="text.pool='first' is no known pooling"):
        Text(dataclasses.replace(spec, text=dataclasses.replace(spec.text, pool="first")), rngs=Keys(0))
