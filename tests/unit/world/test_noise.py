"""Powers of signal and noise in gradients, from vectors whose powers are known."""

import math

import numpy as np
import pytest

from diva_jax.world import noise


def vectors(signal, image, draw, groups, draws, images, width=2000, seed=0):
    """Gradients [groups, draws, width] of groups of images, with these powers."""
    rng = np.random.default_rng(seed)

    def normal(*shape, power):
        return rng.normal(size=(*shape, width)) * math.sqrt(power / width)

    mean = normal(power=1.0)
    mean *= math.sqrt(signal) / np.linalg.norm(mean)
    return mean + normal(groups, 1, images, power=image).mean(2) + normal(groups, draws, images, power=draw).mean(2)


@pytest.mark.parametrize("signal, image, draw", [(2.0, 30.0, 90.0), (5.0, 40.0, 10.0), (1.0, 0.0, 20.0)])
def test_powers_are_found(signal, image, draw):
    products = noise.inner_products(vectors(signal, image, draw, groups=30, draws=3, images=5))
    found = noise.powers(products, 5)
    # The standard error of each is below a tenth of the largest power that it is a difference of.
    assert abs(found["signal"] - signal) < 0.1 * (signal + image / 5)
    assert abs(found["image"] - image) < 0.15 * (image + draw + signal)
    assert abs(found["draw"] - draw) < 0.15 * (image + draw + signal)
    low, high = noise.interval(products, 5)
    scale = noise.advice(found, 1)["noise_scale"]
    assert low < scale < high and scale == pytest.approx((image + draw) / signal, rel=0.15)


def test_advice():
    found = {"signal": 0.5, "image": 25.0, "draw": 100.0}
    told = noise.advice(found, batch=50, cost=1.0)
    assert told == {"noise_scale": 250.0, "best_draws": 2.0, "rate": pytest.approx(1 / 6)}
    # No other number of draws makes a batch of the same cost less noisy.
    cost = {k: (1 + k) * (25 + 100 / k) for k in range(1, 9)}
    assert min(cost, key=cost.get) == 2
    assert noise.advice(found | {"draw": 1.0}, 50)["best_draws"] == 1
    assert noise.advice(found | {"image": -1.0}, 50)["best_draws"] == math.inf
    nothing = noise.advice(found | {"signal": -0.1}, 50)
    assert nothing["noise_scale"] == math.inf and nothing["rate"] == 0


def test_pure_noise_has_an_interval_without_end():
    products = noise.inner_products(vectors(0.0, 10.0, 10.0, groups=12, draws=2, images=4))
    assert noise.interval(products, 4)[1] == math.inf


def test_the_table_has_one_row_per_setting():
    arm = noise.arms.ARMS["stages"]
    found = noise.settings("stages")
    assert [a.fields["diva.first_timestep"] for a in found.values()] == list(noise.FROM)
    assert arm.fields.get("diva.first_timestep") is None and len(noise.settings("unclip")) == 1
    row = dict(
        cosine_draws=0.5, cosine_groups=0.1, noise_scale=30.0, interval=[9.0, math.inf], best_draws=1.0, rate=0.5
    )
    text = noise.table(dict.fromkeys(found, row))
    assert text.count("\n") == 1 + len(found) and "30 [9, inf]" in text
