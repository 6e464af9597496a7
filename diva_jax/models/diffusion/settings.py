"""`config.diffusion`, parsed: which Stable Diffusion it is and where it comes from."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from diva_jax.models.diffusion import latent_code
from diva_jax.models.diffusion.schedule import ScheduleConfig
from diva_jax.models.diffusion.text_encoder import TextEncoderConfig
from diva_jax.models.diffusion.unet import UNetConfig
from diva_jax.models.diffusion.vae import VAEConfig


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """A Stable Diffusion model, see `config.DiffusionOptions`."""

    source: str
    prompt: str
    text_tokens: int
    unet: UNetConfig
    vae: latent_code.LatentCode
    text_encoder: TextEncoderConfig
    scheduler: ScheduleConfig

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "Diffusion":
        """Parses the content of `config.diffusion`; a UserError for an option that is not implemented here."""
        name = str(options["vae"].get("_class_name", ""))
        vae = latent_code.find(name, "config.diffusion.vae._class_name") if "." in name else VAEConfig
        kinds = dict(unet=UNetConfig, vae=vae, text_encoder=TextEncoderConfig, scheduler=ScheduleConfig)
        return cls(
            source=options["source"],
            prompt=options["prompt"],
            text_tokens=options["text_tokens"],
            **{part: kind.from_dict(options[part]) for part, kind in kinds.items()},
        )
