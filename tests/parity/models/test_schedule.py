"""Parity of the noise schedule with diffusers' schedulers."""

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import close

from diva_jax.models.diffusion import schedule
from diva_jax.models.diffusion.presets import PRESETS
from diva_jax.models.diffusion.schedule import ScheduleConfig

SD21_BASE = PRESETS["sd21_base"]["scheduler"]
SCHEDULES = {
    "2.1-base": SD21_BASE,
    "linear": SD21_BASE | dict(beta_schedule="linear", num_train_timesteps=317),
    "cosine": SD21_BASE | dict(beta_schedule="squaredcos_cap_v2"),
    "defaults": {},
}


def theirs(name):
    return diffusers.DDPMScheduler.from_config(SCHEDULES[name])


@pytest.mark.parametrize("name", SCHEDULES)
def test_alphas_cumprod(name):
    expected = theirs(name).alphas_cumprod.numpy()
    ours = schedule.alphas_cumprod(ScheduleConfig.from_dict(SCHEDULES[name]))
    assert ours.dtype == np.float32 and ours.shape == expected.shape
    # Where a beta differs in its last place, 1 - beta may be rounded to the neighbour, by 2^-24: in 33 of 1000 steps.
    np.testing.assert_allclose(ours, expected, rtol=33 * 2**-24)


def test_stable_diffusion_schedule_matches_its_definition():
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = schedule.alphas_cumprod(ScheduleConfig())
    assert ScheduleConfig.from_dict(SD21_BASE) == ScheduleConfig()
    # 1000 roundings by at most 2^-25, which are independent: 5e-7 (standard deviation).
    np.testing.assert_allclose(abar, np.cumprod(1 - beta), rtol=4e-6)


def draws():
    rng = np.random.default_rng(0)
    latents, noise = rng.standard_normal((2, 3, 5, 7, 4)).astype(np.float32)
    return latents, noise, np.array([0, 431, 999])


@pytest.mark.parametrize("name", ["2.1-base", "cosine"])
def test_add_noise_and_targets(name):
    latents, noise, timesteps = draws()
    abar = schedule.alphas_cumprod(ScheduleConfig.from_dict(SCHEDULES[name]))
    reference = theirs(name)
    args = [torch.from_numpy(a) for a in (latents, noise, timesteps)]
    close(schedule.add_noise(latents, noise, abar, timesteps), reference.add_noise(*args), 1e-6)
    velocity = schedule.target(latents, noise, abar, timesteps, "v_prediction")
    close(velocity, reference.get_velocity(*args), 1e-6)
    assert np.array_equal(schedule.target(latents, noise, abar, timesteps, "epsilon"), noise)


def test_several_draws_at_once():
    latents, noise, timesteps = draws()
    abar = schedule.alphas_cumprod(ScheduleConfig())
    noise, timesteps = np.stack([noise, noise[::-1]]), np.stack([timesteps, timesteps[::-1]])
    for f in (schedule.add_noise, lambda *a: schedule.target(*a, "v_prediction")):
        both = f(latents, noise, abar, timesteps)
        one_by_one = np.stack([f(latents, n, abar, t) for n, t in zip(noise, timesteps, strict=True)])
        assert np.array_equal(both, one_by_one)


def test_coefficients_are_not_rounded_to_half_precision():
    latents, noise, timesteps = draws()
    abar = schedule.alphas_cumprod(ScheduleConfig())
    half = [jnp.asarray(a, jnp.bfloat16) for a in (latents, noise)]
    out = schedule.add_noise(*half, abar, timesteps)
    precise = schedule.add_noise(*(a.astype(jnp.float32) for a in half), abar, timesteps)
    assert out.dtype == jnp.bfloat16
    assert np.array_equal(out, precise.astype(jnp.bfloat16))
