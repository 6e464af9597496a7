"""The jittered view: what is drawn, and what each operation does."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np

from diva_jax.data import jitter

SIZE = 22
PICTURE = jnp.asarray(np.random.default_rng(0).uniform(size=(1, SIZE, SIZE, 3)), jnp.float32)


def drawn(order=(0, 1, 2, 3), factors=(1.0, 1.0, 1.0, 0.0), crop=(0, 0, SIZE, SIZE), hflip=False, vflip=False):
    arrays = (jnp.asarray(order), jnp.asarray(factors), jnp.asarray(crop), jnp.asarray(hflip), jnp.asarray(vflip))
    return jitter.Draw(*(a[None] for a in arrays))


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


def test_nothing_drawn_changes_nothing():
    np.testing.assert_allclose(jitter.apply(PICTURE, drawn()), PICTURE, atol=2e-6)


def test_flips_and_crop():
    flipped = jitter.apply(PICTURE, drawn(hflip=True, vflip=True))
    np.testing.assert_allclose(flipped, PICTURE[:, ::-1, ::-1], atol=2e-6)
    top, left, height, width = 1, 2, 19, 20
    want = jax.image.resize(PICTURE[:, top : top + height, left : left + width], PICTURE.shape, "linear")
    np.testing.assert_allclose(jitter.apply(PICTURE, drawn(crop=(top, left, height, width))), want, atol=1e-5)


def test_hue_is_that_of_colorsys():
    shift = 0.04
    ours = np.asarray(jitter.apply(PICTURE, drawn(factors=(1.0, 1.0, 1.0, shift))))[0, 3]
    for pixel, want in zip(ours, np.asarray(PICTURE)[0, 3], strict=True):
        h, s, v = colorsys.rgb_to_hsv(*want)
        np.testing.assert_allclose(pixel, colorsys.hsv_to_rgb((h + shift) % 1, s, v), atol=1e-5)


def test_colour_in_the_drawn_order():
    """Brightness and contrast do not commute where values clip."""
    x = np.asarray(PICTURE[0], np.float64)

    def contrast(x):
        return np.clip(1.1 * x - 0.1 * np.mean(x @ [0.2989, 0.587, 0.114]), 0, 1)

    def brightness(x):
        return np.clip(1.1 * x, 0, 1)

    factors = (1.1, 1.1, 1.0, 0.0)
    first = jitter.apply(PICTURE, drawn(order=(0, 1, 2, 3), factors=factors))[0]
    second = jitter.apply(PICTURE, drawn(order=(2, 1, 3, 0), factors=factors))[0]
    np.testing.assert_allclose(first, contrast(brightness(x)), atol=1e-5)
    np.testing.assert_allclose(second, brightness(contrast(x)), atol=1e-5)
    assert np.abs(first - second).max() > 2e-4
