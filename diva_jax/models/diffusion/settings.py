"""`config.diffusion`, parsed: which Stable Diffusion it is and where it comes from."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from diva_jax.models.diffusion.flux_vae import FluxVAE, FluxVAEConfig
from diva_jax.models.diffusion.patch_code import KIND, PatchCode, PatchCodeConfig
from diva_jax.models.diffusion.schedule import ScheduleConfig
from diva_jax.models.diffusion.text_encoder import TextEncoderConfig
from diva_jax.models.diffusion.unet import UNetConfig
from diva_jax.models.diffusion.vae import VAE, VAEConfig

_CODES = {VAEConfig: VAE, FluxVAEConfig: FluxVAE, PatchCodeConfig: PatchCode}


def latent_code(config: VAEConfig | FluxVAEConfig | PatchCodeConfig, **kw) -> nnx.Module:
    """The VAE of this shape, or the patch code in its place; arguments as those of all."""
    return _CODES[type(config)](config, **kw)


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """A Stable Diffusion model.

    Attributes:
      source: diffusers folder or hub id.
      prompt: the text whose states are part of every condition.
      text_tokens: the prompt is padded to this many.
      unet, vae, text_encoder, scheduler: the parts' configs.
    """

    source: str
    prompt: str
    text_tokens: int
    unet: UNetConfig
    vae: VAEConfig | PatchCodeConfig
    text_encoder: TextEncoderConfig
    scheduler: ScheduleConfig

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "Diffusion":
        """Parses the content of `config.diffusion`.

        Raises:
          UserError: a part has an option that is not implemented here.
        """
        vae = PatchCodeConfig if options["vae"].get("_class_name") == KIND else VAEConfig
        kinds = dict(unet=UNetConfig, vae=vae, text_encoder=TextEncoderConfig, scheduler=ScheduleConfig)
        return cls(
            source=options["source"],
            prompt=options["prompt"],
            text_tokens=options["text_tokens"],
            **{part: kind.from_dict(options[part]) for part, kind in kinds.items()},
        )
