"""Text towers with a longer context than their checkpoint's."""

import dataclasses

import numpy as np
import pytest
import small
from flax import nnx

from diva_jax import demo, weights
from diva_jax.common.errors import UserError
from diva_jax.weights import readers, resample


def long_clip(table, kept):
    """The loops of Long-CLIP's code in our words: four rows for each old one, the last ones extrapolated."""
    old = len(table)
    rows = list(table[:kept])
    for i in range(kept, old):
        step = table[i + 1] - table[i] if i + 1 < old else table[i] - table[i - 1]
        rows += [table[i] + k / 4 * step for k in range(4)]
    return np.stack(rows)


@pytest.mark.parametrize(("old", "kept", "width"), [(77, 20, 5), (13, 0, 3), (9, 7, 2)])
def test_positions_are_stretched_as_long_clip_does_it(old, kept, width):
    table = np.random.default_rng(old).normal(size=(old, width)).astype(np.float32)
    want = long_clip(table.astype(np.float64), kept)
    got = resample.stretch(table, len(want), kept)
    assert got.dtype == np.float32 and len(got) == (248 if old == 77 else len(want))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    demo.write_clip(folder, small.SPEC)
    return folder


def longer(**fields):
    return dataclasses.replace(small.SPEC, text=dataclasses.replace(small.SPEC.text, **fields))


def test_a_checkpoint_is_stretched_only_where_that_is_asked_for(folder):
    stored = np.asarray(readers.open_file(folder / "open_clip_model.safetensors")["positional_embedding"])
    text = weights.load(str(folder), longer(context_length=248, kept_positions=20), tower="text")
    np.testing.assert_array_equal(text.pos_embed[...], resample.stretch(stored, 248, 20))
    assert text.encode(np.zeros((2, 248), np.int32)).shape == (2, small.SPEC.embed_dim)
    same = weights.load(str(folder), longer(kept_positions=20), tower="text")
    np.testing.assert_array_equal(same.pos_embed[...], stored)
    plain = nnx.state(weights.load(str(folder), small.SPEC, tower="text"))
    assert len(nnx.to_flat_state(plain)) == len(nnx.to_flat_state(nnx.state(text)))
    for fields, says in (
        (dict(context_length=248), "context_length is 77 there and 248 in the config"),
        (dict(context_length=248, kept_positions=76), "kept_positions=76 cannot be kept of 77 .* use at most 75"),
        (dict(context_length=60, kept_positions=60), "use at most 59"),
        (dict(width=36, kept_positions=20), "width is 32 there"),
    ):
        with pytest.raises(UserError, match=says):
            weights.load(str(folder), longer(**fields), tower="text")
