"""Latents of a frozen VAE: computed in the step, or from a cache of its moments (`config.data.latents`)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from diva_jax.data import inputs
from diva_jax.models.diffusion.latent_code import LatentCode
from diva_jax.weights import parts


@dataclasses.dataclass(frozen=True)
class LatentSource:
    """Where an objective's latents come from: a VAE's shape and the source of its weights, for images of `size` pixels.

    `dtype` and `held` are what the VAE computes in and what its weights are held in; `view` is how its input is made of
    the image, see `preprocess.vae_view`; `cached`: whether moments come with the batch, and the objective has no VAE.
    """

    vae: LatentCode
    part: parts.Part
    size: int
    dtype: str
    held: str
    view: str = "exact"
    cached: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one image's moments: height, width, and the channels of `vae`."""
        side = self.size // self.vae.downscale
        return side, side, self.vae.moment_channels

    @property
    def latents_shape(self) -> tuple[int, int, int]:
        """The shape of one image's latents."""
        return *self.shape[:2], self.vae.latent_channels

    @property
    def inputs(self) -> Mapping[str, inputs.Input]:
        """What the batch holds: "image", and "moments" where they are cached."""
        image = {"image": inputs.Image(self.size)}
        return image | {"moments": inputs.Cached(self.shape)} if self.cached else image

    @property
    def pretrained(self) -> Mapping[str, parts.Part]:
        """{"vae": its source}; nothing where moments are cached."""
        return {} if self.cached else {"vae": self.part}

    def facts(self) -> dict[str, Any]:
        """What moments depend on beside the image, its crop and the VAE's weights, for JSON."""
        vae = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self.vae).items()}
        return {"vae": vae, "image_size": self.size, "dtype": self.dtype, "held": self.held, "view": self.view}
