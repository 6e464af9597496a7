"""The gradient of the vision encoder against finite differences in float64."""

import jax
import numpy as np
import small
from helpers import abstract_mesh

from diva_jax.objectives.diva import Objective


def test_finite_differences():
    with jax.enable_x64(True), jax.sharding.use_abstract_mesh(abstract_mesh("cpu")):
        c = small.small_config(dtype="float64", frozen_dtype="float64", batch_size=2)
        p = small.program(c)
        arrays = {n: np.asarray(a, np.float64) for n, a in small.random_arrays(p).items()}
        trained = {n: arrays[n] for n in p.trained}
        frozen = {n: a for n, a in arrays.items() if n not in trained}
        rng = np.random.default_rng(1)
        pixels = rng.uniform(size=(2, 24, 24, 3))
        module: Objective = p.skeleton.merge(arrays)
        drawn = module.draw(jax.random.split(jax.random.key(0), 2), (12, 12, 4))
        drawn = drawn._replace(noise=rng.normal(size=drawn.noise.shape))

        def loss(trained):
            return p.skeleton.merge(trained, frozen).forward(pixels, drawn)[0]

        value_and_grad = jax.jit(jax.value_and_grad(loss))
        value, grads = value_and_grad(trained)
        assert value.dtype == np.float64
        for seed in range(3):
            rng = np.random.default_rng(seed)
            direction = {n: rng.normal(size=a.shape) for n, a in trained.items()}
            h = 1e-6
            plus, _ = value_and_grad({n: a + h * direction[n] for n, a in trained.items()})
            minus, _ = value_and_grad({n: a - h * direction[n] for n, a in trained.items()})
            slope = (float(plus) - float(minus)) / (2 * h)
            expected = sum(float(np.vdot(grads[n], direction[n])) for n in trained)
            np.testing.assert_allclose(expected, slope, rtol=2e-6)
        # Single parameters: in a block, at the start of the tower, and in the projection.
        for name in ("vision/blocks/0/attn/qkv/kernel", "vision/patch_embed/kernel", "visual_proj/bias"):
            direction = rng.normal(size=trained[name].shape)
            shifted = [value_and_grad(trained | {name: trained[name] + s * 1e-6 * direction})[0] for s in (1, -1)]
            slope = (float(shifted[0]) - float(shifted[1])) / 2e-6
            np.testing.assert_allclose(float(np.vdot(grads[name], direction)), slope, rtol=1e-5)
