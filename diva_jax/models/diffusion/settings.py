"""`config.diffusion`, parsed: which Stable Diffusion it is and where it comes from."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from diva_jax.models.diffusion.patch_code import KIND, PatchCode, PatchCodeConfig
from diva_jax.models.diffusion.schedule import ScheduleConfig
from diva_jax.models.diffusion.text_encoder import TextEncoderConfig
from diva_jax.models.diffusion.unet import UNetConfig
from diva_jax.models.diffusion.vae import VAE, VAEConfig

# Whether `_class_name` in the config of the VAE is that of a patch code -> what is there.
_VAES = {False: (VAEConfig, VAE), True: (PatchCodeConfig, PatchCode)}


def latent_code(config: VAEConfig | PatchCodeConfig, **kw) -> nnx.Module:
    """The VAE, or the patch code in its place; arguments as those of both."""
    return _VAES[isinstance(config, PatchCodeConfig)][1](config, **kw)


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
        vae = _VAES[options["vae"].get("_class_name") == KIND][0]
        kinds = dict(unet=UNetConfig, vae=vae, text_encoder=TextEncoderConfig, scheduler=ScheduleConfig)
        return cls(
            source=options["source"],
            prompt=options["prompt"],
            text_tokens=options["text_tokens"],
            **{part: kind.from_dict(options[part]) for part, kind in kinds.items()},
        )
