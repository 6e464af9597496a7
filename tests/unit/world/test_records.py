"""The world as training data, found by the name of its module."""

import io

import numpy as np
import pytest
from PIL import Image

from diva_jax.common.errors import UserError
from diva_jax.data import sources
from diva_jax.world import drawing, records, write


def test_a_record_is_a_function_of_seed_and_number():
    source = sources.open_source(records.path(5, "rich", 1000))
    again = sources.open_source(records.path(5, "rich", 1000))
    other = sources.open_source(records.path(6, "rich", 1000))
    assert len(source) == 1000 and source.has_text
    for i in (0, 7, 999):
        assert source.read(i) == again.read(i) != other.read(i)
    record = source.read(7)
    image = np.asarray(Image.open(io.BytesIO(record.image)))
    np.testing.assert_array_equal(image, drawing.draw(source.scene(7)[0])[0])
    assert record.text and source.read(7, with_text=False).text is None


def test_the_kind_of_captions_does_not_change_the_images():
    rich, biased = (sources.open_source(records.path(5, kind)) for kind in ("rich", "biased"))
    assert rich.read(3).image == biased.read(3).image
    assert sum(len(rich.read(i).text) - len(biased.read(i).text) for i in range(30)) > 200


@pytest.mark.parametrize("options", ["seed=x", "seed=-1", "captions=long", "count=0", "colour=red", "seed=9" * 9])
def test_wrong_options_are_named(options):
    with pytest.raises(UserError, match=r"config\.data\.path=module:diva_jax\.world\.records"):
        sources.open_source(f"{records.MODULE}?{options}")


@pytest.mark.parametrize("module", ["no.such.module", "json", "", "diva_jax..data"])
def test_a_module_that_makes_no_sources(module):
    with pytest.raises(UserError, match="give module:NAME of one on PYTHONPATH that defines open_source"):
        sources.open_source(f"module:{module}?a=1")


def test_written_shards_have_the_same_records(tmp_path):
    source = sources.open_source(records.path(5, "rich", 7))
    assert [s.name for s in write.write(tmp_path, source, per_shard=3)] == ["00000.tar", "00001.tar", "00002.tar"]
    there = sources.open_source(str(tmp_path))
    assert len(there) == 7
    for i in range(7):
        ours, theirs = source.read(i), there.read(i)
        assert ours.text == theirs.text
        images = [np.asarray(Image.open(io.BytesIO(r.image)).convert("RGB")) for r in (ours, theirs)]
        np.testing.assert_array_equal(*images)
