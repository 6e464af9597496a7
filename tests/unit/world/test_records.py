"""The world as training data, found by the name of its module."""

import io

import numpy as np
import pytest
from PIL import Image

from diva_jax.common.errors import UserError
from diva_jax.data import sources
from diva_jax.world import records, scenes


def test_a_record_is_a_function_of_seed_and_number():
    source = sources.open_source(records.path(5, "rich", 1000))
    again = sources.open_source(records.path(5, "rich", 1000))
    other = sources.open_source(records.path(6, "rich", 1000))
    assert len(source) == 1000 and source.has_text
    for i in (0, 7, 999):
        assert source.read(i) == again.read(i) != other.read(i)
    image = np.asarray(Image.open(io.BytesIO(source.read(7).image)))
    assert image.shape == (16, 16, 3) and source.read(7).text and source.read(7, with_text=False).text is None


def test_the_kind_of_captions_does_not_change_the_images():
    rich, biased = (sources.open_source(records.path(5, kind)) for kind in ("rich", "biased"))
    assert rich.read(3).image == biased.read(3).image
    related = [sum(any(r in s.read(i).text for r in scenes.RELATIONS) for i in range(100)) for s in (rich, biased)]
    assert related[0] > 85 and related[1] < 15


def test_texts_are_a_true_one_and_one_with_the_opposite_relation():
    source = sources.open_source(records.path(5))
    assert source.read(0, with_text=False).texts is None
    for i in range(20):
        true, false = source.read(i).texts
        (a,), (b,) = ([r for r in scenes.RELATIONS if f" {r} " in t] for t in (true, false))
        assert true.replace(a, b) == false and scenes.RELATIONS.index(a) == scenes.RELATIONS.index(b) ^ 1


@pytest.mark.parametrize("options", ["seed=x", "seed=-1", "captions=long", "count=0", "colour=red", "seed=9" * 9])
def test_wrong_options_are_named(options):
    with pytest.raises(UserError, match=r"config\.data\.path=module:diva_jax\.world\.records"):
        sources.open_source(f"{records.MODULE}?{options}")


@pytest.mark.parametrize("module", ["no.such.module", "json", "", "diva_jax..data"])
def test_a_module_that_makes_no_sources(module):
    with pytest.raises(UserError, match="give module:NAME of one on PYTHONPATH that defines open_source"):
        sources.open_source(f"module:{module}?a=1")
