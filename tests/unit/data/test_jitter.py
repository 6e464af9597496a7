"""The jittered view: what is drawn; what becomes of an image is in DCR's golden file."""

import jax
import numpy as np

from diva_jax.data import jitter

SIZE = 22


def test_draws_lie_in_their_ranges_and_depend_on_their_own_key():
    keys = jax.random.split(jax.random.key(3), 400)
    d = jax.device_get(jax.jit(jitter.draw, static_argnums=1)(keys, SIZE))
    assert (np.sort(d.order, axis=1) == np.arange(4)).all() and len(np.unique(d.order, axis=0)) == 24
    assert (abs(d.factors[:, :3] - 1) <= 0.1).all() and (abs(d.factors[:, 3]) <= 0.05).all()
    assert np.std(d.factors[:, :3], axis=0).min() > 0.05 and np.std(d.factors[:, 3]) > 0.025
    top, left, height, width = d.crop.T
    assert (d.crop >= 0).all() and (top + height <= SIZE).all() and (left + width <= SIZE).all()
    area, ratio = height * width / SIZE**2, width / height
    assert area.min() > 0.85 and ratio.min() > 0.85 and ratio.max() < 1.18 and len(np.unique(d.crop, axis=0)) > 20
    assert 0.4 < d.hflip.mean() < 0.6 and 0.4 < d.vflip.mean() < 0.6
    some = jax.device_get(jitter.draw(keys[7:9], SIZE))
    for ours, want in zip(some, d, strict=True):
        np.testing.assert_allclose(ours, want[7:9], rtol=1e-6)
