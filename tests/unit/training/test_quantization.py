"""`config.frozen_quantization`: which weights it takes, what it refuses, and that the gradient keeps its direction."""

import jax
import numpy as np
import pytest
import small

from diva_jax.common.errors import UserError
from diva_jax.models.quantized import Quantized
from diva_jax.training import step


def gradient(p):
    arrays, batch = small.random_arrays(p), small.batch(p, 0, 4)
    trained = {n: arrays[n] for n in p.trained}
    keys = step.image_keys(jax.random.key_data(jax.random.key(0)), np.int32(0), batch["row"])

    def loss(trained, frozen):
        return p.skeleton.merge(trained, p.quantized(frozen)).loss(batch, keys)[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(trained, {n: arrays[n] for n in p.abstract_frozen()})
    return float(value), np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads)])


def test_the_gradient_keeps_its_direction():
    exact, rounded = (gradient(small.program(small.small_config(frozen_quantization=q))) for q in ("", "int8"))
    assert rounded[0] != exact[0] and abs(rounded[0] - exact[0]) < 0.02 * exact[0]
    cosine = exact[1] @ rounded[1] / np.linalg.norm(exact[1]) / np.linalg.norm(rounded[1])
    assert 0.99 < cosine < 0.9999999


def test_which_weights():
    """All linear layers of the U-Net's transformers and its 1x1 convolutions; nothing of other parts."""
    p = small.program(small.small_config(frozen_quantization="int8"))
    kernels = {n for n in p.arrays if n.startswith("unet/") and n.endswith("/kernel")}
    left = {n for n in kernels - p.narrow if p.arrays[n].ndim == 2 or p.arrays[n].shape[0] == 1}
    assert p.narrow <= kernels and left and all("/time_emb" in n for n in left)
    quantized = jax.eval_shape(p.quantized, p.abstract_frozen())
    assert {n for n, a in quantized.items() if isinstance(a, Quantized)} == p.narrow


def test_default_changes_nothing():
    p = small.program(small.small_config())
    frozen = {n: object() for n in p.abstract_frozen()}
    assert p.quantized(frozen) == frozen and not p.narrow


def test_what_is_trained_is_refused():
    table = (("unet/mid_block/.*", 1.0), (".*", 0.0))
    with pytest.raises(UserError, match=r"must be frozen, but config.trainable trains unet/mid_block/attentions"):
        small.program(small.small_config(frozen_quantization="int8", trainable=table))
