"""The trainable table covers all parameters, and invalid tables are refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diva_jax.common.errors import UserError
from diva_jax.training import partition

NAMES = ("vision/blocks/0/attn/qkv/kernel", "vision/blocks/10/norm1/scale", "visual_proj/bias", "unet/conv_in/bias")


def test_first_match_wins():
    table = ((r"vision/.*norm\d/.*", 0.0), ("vision/.*", 0.5), ("visual_proj/.*", 1.0), (".*", 0.0))
    assert partition.scales(table, NAMES) == dict(zip(NAMES, (0.5, 0.0, 1.0, 0.0), strict=True))


@pytest.mark.parametrize(
    "table, said",
    [
        ((("vision/.*", 1.0),), "visual_proj/bias, unet/conv_in/bias"),
        ((("vison/.*", 1.0), (".*", 0.0)), "'vison/.*' matches no parameter"),
        (((".*", 0.0), ("vision/.*", 1.0)), "earlier patterns match all"),
        (((".*", 0.0),), "trains nothing"),
        ((("vision/(", 1.0), (".*", 0.0)), "not a regular expression"),
        ((("vision", 1.0), (".*", 0.0)), "'vision' matches no parameter"),
    ],
)
def test_wrong_tables(table, said):
    with pytest.raises(UserError, match="config.trainable") as e:
        partition.scales(table, NAMES)
    assert said in str(e.value)


def test_disassemble_and_merge_are_inverse():
    class Both(nnx.Module):
        def __init__(self):
            self.parts = nnx.List([nnx.Linear(3, 5, rngs=nnx.Rngs(i)) for i in range(2)])
            self.constant = nnx.Variable(jnp.arange(4.0))

    module = Both()
    skeleton, arrays = partition.disassemble(module)
    assert set(arrays) == {"parts/0/kernel", "parts/0/bias", "parts/1/kernel", "parts/1/bias", "constant"}
    again = skeleton.merge(
        {n: a + 1 for n, a in arrays.items() if "kernel" in n}, {n: a for n, a in arrays.items() if "kernel" not in n}
    )
    np.testing.assert_array_equal(again.parts[1].kernel[...], module.parts[1].kernel[...] + 1)
    np.testing.assert_array_equal(again.constant[...], module.constant[...])
