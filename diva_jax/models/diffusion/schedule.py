"""The noise schedule: the amount of noise at each timestep, and the target of the U-Net's prediction."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from diva_jax.common.fields import between, choice, field
from diva_jax.models.layers import Array
from diva_jax.models.library_config import LibraryConfig


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """A noise schedule for timesteps 0 .. T-1, with diffusers' defaults."""

    num_train_timesteps: int = field(1000, "T.", between(1, 2**20))
    beta_start: float = field(0.0001, "The variance of the noise added at the first timestep.", between(1e-9, 0.999))
    beta_end: float = field(0.02, "The variance of the noise added at the last timestep.", between(1e-9, 0.999))
    beta_schedule: str = choice(
        ("linear", "scaled_linear", "squaredcos_cap_v2"),
        "Between them it is linear, linear in its square root, or instead a cosine (arXiv 2102.09672, equation 17).",
    )
    prediction_type: str = choice(("epsilon", "v_prediction"), "The U-Net predicts the noise, or the velocity.")

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "ScheduleConfig":
        """Reads a diffusers folder's `scheduler_config.json`; options of sampling are ignored."""
        file = LibraryConfig(options, "the scheduler's config")
        for name, allowed in (("trained_betas", (None,)), ("rescale_betas_zero_snr", (None, False))):
            if options.get(name) not in allowed:
                file.refuse(name, "it is not supported: use the scheduler of a Stable Diffusion checkpoint")
        return cls(**{f.name: file.get(f.name, f.default, f.metadata["rule"]) for f in dataclasses.fields(cls)})


def alphas_cumprod(config: ScheduleConfig) -> np.ndarray:
    """The remaining share of the latents' variance at each timestep, abar, [T] float32: the cumulative product of 1 -
    beta, which is rounded to float32 before, as in diffusers."""
    start, end, n = config.beta_start, config.beta_end, config.num_train_timesteps
    if config.beta_schedule == "linear":
        betas = np.linspace(start, end, n)
    elif config.beta_schedule == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, n) ** 2
    else:
        remaining = np.cos((np.linspace(0, 1, n + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - remaining[1:] / remaining[:-1], 0.999)
    return np.cumprod(np.float32(1) - betas.astype(np.float32), dtype=np.float64).astype(np.float32)


def nats_per_error(config: ScheduleConfig, values: int, kind: str = "") -> np.ndarray:
    """What a timestep's gap between two mean squared errors says about likelihoods, by the I-MMSE relation: [T]
    float64. For the errors of the predicted noise, summed over the latents' values, log p(x | c) - log p(x | c') is
    half of the integral of error(c') - error(c) over the logarithm of the signal-to-noise ratio abar / (1 - abar)
    (arXiv 2302.03792). It is exact for a model that predicts the conditional mean, and here an estimate, without the
    noise levels outside of the schedule: the sum over all timesteps of gap times weight, nats per unit of the gap,
    where errors are means over `values` numbers. An error of the velocity is 1 / abar times that of the noise; `kind`
    is "epsilon" or "v_prediction", by default what the U-Net predicts."""
    left = alphas_cumprod(config).astype(np.float64)
    weight = 0.5 * values * np.abs(np.gradient(np.log(left / (1 - left))))
    return weight * left if (kind or config.prediction_type) == "v_prediction" else weight


def _coefficients(like: Array, alphas_cumprod: Array, timesteps: Array) -> tuple[Array, Array]:
    """Returns sqrt(abar_t) and sqrt(1 - abar_t) in at least float32, in shapes that broadcast against `like`."""
    left = jnp.asarray(alphas_cumprod)[timesteps].astype(jnp.promote_types(like.dtype, jnp.float32))
    left = left.reshape(timesteps.shape + (1,) * (like.ndim - timesteps.ndim))
    return jnp.sqrt(left), jnp.sqrt(1 - left)


def add_noise(latents: Array, noise: Array, alphas_cumprod: Array, timesteps: Array) -> Array:
    """zt = sqrt(abar_t) z0 + sqrt(1 - abar_t) eps (DIVA, section 3.1), in the shape and dtype of `noise`, [..., B, H,
    W, C], against which z0 broadcasts. `alphas_cumprod` is [T], `timesteps` are integers [..., B]."""
    signal, sigma = _coefficients(noise, alphas_cumprod, timesteps)
    return (signal * latents + sigma * noise).astype(noise.dtype)


def target(latents: Array, noise: Array, alphas_cumprod: Array, timesteps: Array, prediction_type: str) -> Array:
    """Returns the target of the U-Net's prediction, in the shape and dtype of `noise`; arguments as `add_noise`'s. It
    is the noise for the type "epsilon", and sqrt(abar_t) eps - sqrt(1 - abar_t) z0 (the velocity, arXiv 2202.00512,
    section 4) for "v_prediction"."""
    if prediction_type == "epsilon":
        return noise
    signal, sigma = _coefficients(noise, alphas_cumprod, timesteps)
    return (signal * noise - sigma * latents).astype(noise.dtype)
