"""Pictures of what the encoder makes the generator see: its denoised estimate under the encoder's condition."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from diva_jax.models.diffusion import schedule
from diva_jax.objectives.diva import Draws

_ENLARGED = 4  # Pixels of the result per pixel of a picture.
_GAP = 2  # Pixels between pictures.


def estimates(
    program, weights: Sequence[Mapping[str, jax.Array]], images: np.ndarray, timestep: int, seed: int = 0
) -> list[np.ndarray]:
    """The U-Net's estimate of the pictures from latents with noise, under the condition of the vision encoder.

    z0' = (z_t - sqrt(1 - abar_t) eps') / sqrt(abar_t), for a U-Net that predicts the noise eps'.

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
        drawn = Draws(jnp.full(len(images), timestep), noise, None)
        _, context = m.context(m.visual_proj, m.vision.encode(backbone_view), drawn)
        pred, _ = m.denoise(latents, drawn, context)
        left = schedule.alphas_cumprod(m.diffusion.scheduler)[timestep]
        noisy = schedule.add_noise(latents, noise, schedule.alphas_cumprod(m.diffusion.scheduler), drawn.timesteps)
        return m.vae.decode((noisy - (1 - left) ** 0.5 * pred) / left**0.5)

    compiled = jax.jit(run)
    found = [np.asarray(compiled(params, images)) for params in weights]
    return [np.clip(127.5 * (x + 1) + 0.5, 0, 255).astype(np.uint8) for x in found]


def sheet(rows: list[np.ndarray]) -> Image.Image:
    """Rows of pictures, each uint8 [N, S, S, 3], as one enlarged picture."""
    n, s = rows[0].shape[:2]
    out = np.full((len(rows) * (s + _GAP) + _GAP, n * (s + _GAP) + _GAP, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            y, x = _GAP + i * (s + _GAP), _GAP + j * (s + _GAP)
            out[y : y + s, x : x + s] = picture
    return Image.fromarray(out).resize((_ENLARGED * out.shape[1], _ENLARGED * out.shape[0]), Image.Resampling.NEAREST)
