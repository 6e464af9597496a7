"""The information of a condition in nats, against a Gaussian whose likelihoods are known."""

import numpy as np
import pytest

from diva_jax.models.diffusion import schedule
from diva_jax.models.diffusion.schedule import ScheduleConfig


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "squaredcos_cap_v2"])
def test_a_gaussian_has_the_mutual_information_of_its_condition(kind, beta_schedule):
    """x = c + noise of variance 0.3, c of variance 1.7; the errors are those of the best predictions."""
    config = ScheduleConfig(beta_schedule=beta_schedule, prediction_type=kind)
    left = schedule.alphas_cumprod(config).astype(np.float64)
    snr, with_condition, without = left / (1 - left), 0.3, 2.0

    def error(variance):
        of_noise = snr * variance / (1 + snr * variance)
        return of_noise if kind == "epsilon" else of_noise / left

    gap = error(without) - error(with_condition)
    values = 35
    nats = (schedule.nats_per_error(config, values) * gap).sum()
    # The noise levels of the schedule are not all, so the exact value is that of the integral between its ends.
    ends = [0.5 * values * np.log((1 + r * without) / (1 + r * with_condition)) for r in (snr[0], snr[-1])]
    assert nats == pytest.approx(ends[0] - ends[1], rel=3e-3)
    assert nats == pytest.approx(0.5 * values * np.log(without / with_condition), rel=0.02)
