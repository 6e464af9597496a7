"""Images of what the encoder makes the generator see: its denoised estimate under the encoder's condition."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from diva_jax.models.diffusion import schedule
from diva_jax.objectives.diva import DivaDraws

_ENLARGED = 5  # Pixels of the result per pixel of an image, along each side.


def estimates(
    program, weights: Sequence[Mapping[str, jax.Array]], images: np.ndarray, timestep: int, seed: int = 0
) -> list[np.ndarray]:
    """The U-Net's estimate of the images from latents with noise, under the condition of the vision encoder.

    Args:
      program: a `training.step.Program` of the objective `diva` with a patch code.
      weights: sets of weights, each with every parameter of the program.
      images: uint8 [N, S, S, 3].
      timestep: of the noise.
      seed: of the noise, which depends on it and on N alone.

    Returns:
      uint8 [N, S, S, 3] for each set of weights.
    """

    def run(params, images):
        m = program.skeleton.merge(params)
        vae_view, backbone_view = m.views(images.astype(jnp.float32) / 255)
        latents = m.vae.encode(vae_view)
        noise = jax.random.normal(jax.random.key(seed), latents.shape)
        drawn = DivaDraws(jnp.full(len(images), timestep), noise, None)
        _, context = m.context(m.visual_proj, m.vision.encode(backbone_view), drawn)
        pred, _ = m.denoise(latents, drawn, context)
        scheduler = m.diffusion.scheduler
        abar = schedule.alphas_cumprod(scheduler)
        noisy = schedule.add_noise(latents, noise, abar, drawn.timesteps)
        left = jnp.asarray(abar)[drawn.timesteps][:, None, None, None]
        signal, sigma = jnp.sqrt(left), jnp.sqrt(1 - left)
        # The latents that the prediction implies: the inverse of `schedule.add_noise` and `schedule.target`.
        if scheduler.prediction_type == "epsilon":
            return m.vae.decode(((noisy - sigma * pred) / signal).astype(noisy.dtype))
        return m.vae.decode((signal * noisy - sigma * pred).astype(noisy.dtype))

    compiled = jax.jit(run)
    found = [np.asarray(compiled(params, images)) for params in weights]
    return [np.clip(127.5 * (x + 1) + 0.5, 0, 255).astype(np.uint8) for x in found]


def enlarged(image: np.ndarray) -> Image.Image:
    """A image, uint8 [S, S, 3], with `_ENLARGED` x `_ENLARGED` pixels for each of its own."""
    return Image.fromarray(image.repeat(_ENLARGED, axis=0).repeat(_ENLARGED, axis=1))
