"""Values of config fields that make no sense: refused in one sentence that names the field, before anything is made."""

import json
import math

import numpy as np
import pytest
import small
from ml_collections import ConfigDict
from mutations import changed

from diva_jax import config
from diva_jax.common import fields
from diva_jax.common.errors import UserError

pytestmark = pytest.mark.attack

RULED = sorted({field for field, _, _ in config._RULES})
WILD = [
    -1,
    -(10**12),
    10**15,
    0.5,
    -0.5,
    math.nan,
    math.inf,
    -math.inf,
    "abc",
    "",
    None,
    (),
    (1,),
    (math.nan, 1.0),
    True,
]


def flat(c) -> dict:
    return fields.flatten(c.to_dict(), config.WHOLE)


GIVEN = flat(small.small_config())


def check(field: str, value) -> None:
    """Applies the rules to a small config with one field changed, whatever its type."""
    fields.require(GIVEN | {field: value}, config._RULES)


def test_what_is_published_is_good():
    config.validate(small.small_config(), 1)
    assert set(RULED) <= set(GIVEN) and len(RULED) > 45


@pytest.mark.parametrize("field", RULED)
def test_wild_values(field):
    """Each is refused by name, or its rule holds for it."""
    rules = [holds for f, holds, _ in config._RULES if f == field]
    refused = 0
    for value in WILD:
        try:
            check(field, value)
        except UserError as e:
            assert "\n" not in str(e) and f"config.{field}=" in str(e), e
            refused += 1
        else:
            assert all(holds(value) for holds in rules), (field, value)
    assert refused >= 2


@pytest.mark.parametrize(
    "field, value",
    [
        *(("optim." + f, v) for f in ("lr", "clip", "weight_decay") for v in (-1e-9, math.nan, math.inf)),
        *(("optim." + f, v) for f in ("b1", "b2", "momentum", "warmup") for v in (1.0, 1.5, -0.1, math.nan, 5)),
        *(("data.crop.scale", v) for v in (0.5, (1e-9, 1e-9), (0.9, 0.5), (0.5, 1.5), (0, 1), (0.5,))),
        *(("data.crop.ratio", v) for v in (0.5, "abc", (2, 1), (1e-9, 1), (1, math.inf))),
        *(("trainable", v) for v in ("abc", (("a",),), (("a", "b"),), ((".*", -1.0),), ((".*", math.nan),), 3)),
        *(("backbone." + f, v) for f in ("heads", "width", "patch_size", "layers") for v in (0, -1, 10**9, 2.5)),
        *(("backbone.mean", v) for v in ((0.5,), (0.1, 0.2, 0.3, 0.4), (0.1, math.nan, 0.2), 0.5)),
        *(("backbone.select", v) for v in ("random:99999999", "runs:0", "random:" + "9" * 5000)),
        *(("steps", v) for v in (0, -5, 10**12, 1.5, True)),
        ("condition.warmup_steps", -5),
        ("profile.steps", -5),
        ("checkpoint.timeout", 0),
        ("data.image_size", 10**9),
    ],
)
def test_named_values(field, value):
    with pytest.raises(UserError, match=f"config.{field}="):
        check(field, value)


@pytest.mark.parametrize("seed", range(10))
def test_rules_of_numbers(seed):
    rng = np.random.default_rng(seed)
    least, most = sorted(int(n) for n in rng.integers(-100, 100, 2))
    for value in (*rng.integers(-150, 150, 20).tolist(), least, most):
        good = least <= value <= most
        assert fields.whole("x", least, most)[1](value) == good
        assert fields.between("x", least, most)[1](value + 0.0) == good
        assert fields.between("x", least, most, below=True)[1](value) == (good and value != most)
    for value in (math.nan, math.inf, "1", None, True, 1j):
        assert not fields.between("x", -1e300, 1e300)[1](value) and not fields.whole("x", -(10**9))[1](value)


def test_values_that_do_not_fit_together():
    with pytest.raises(UserError, match=r"config.trainable=\(\) must have rows"):
        config.validate(small.small_config(trainable=()), 1)
    with pytest.raises(UserError, match="JAX_ENABLE_X64"):
        config.validate(small.small_config(dtype="float64"), 1)
    with pytest.raises(UserError, match="config.data.image_size=25 must be a multiple of 2"):
        config.validate(small.small_config(data__image_size=25), 1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("objective", ["diva", "genhancer"])
def test_configs_of_workdirs(objective, seed):
    """One that was changed is refused, or has possible values of the types of the defaults."""
    good, rng = json.loads(config.default(objective=objective).to_json()), np.random.default_rng(seed)
    config.check_stored(ConfigDict(good), "w")
    for _ in range(40):
        tree, what = changed(rng, good, int(rng.integers(1, 3)))
        try:
            stored = ConfigDict(tree)
        except (TypeError, ValueError, AttributeError):  # Names that no config can have.
            continue
        try:
            config.check_stored(stored, "w")
        except UserError as e:
            assert "\n" not in str(e) and len(str(e)) < 1000, what
