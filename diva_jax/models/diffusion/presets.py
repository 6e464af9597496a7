"""`config.diffusion`: the published Stable Diffusion models, and any other one, parsed."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from diva_jax.models.diffusion import latent_code
from diva_jax.models.diffusion.schedule import ScheduleConfig
from diva_jax.models.diffusion.text_encoder import TextEncoderConfig
from diva_jax.models.diffusion.unet import UNetConfig
from diva_jax.models.diffusion.vae import VAEConfig
from diva_jax.models.library_config import packaged

# With the names and values of their diffusers folders' config files. Stable unCLIP (unclip_l, unclip_h) is conditioned
# on [image embedding, code of the embedding's noise level], OpenAI ViT-L/14's (768) and OpenCLIP ViT-H/14's (1024);
# tiny is for the demo and the tests.
PRESETS = packaged(__file__, "presets.json")


def preset(name: str) -> dict:
    """Returns a copy of a preset: {"unet": ..., "vae": ..., "text_encoder": ..., "scheduler": ...}."""
    return copy.deepcopy(PRESETS[name])


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
