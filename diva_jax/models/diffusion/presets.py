"""`config.diffusion`: the published Stable Diffusion models, and any other one, parsed."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from flax import nnx

from diva_jax.common import config_files
from diva_jax.common.errors import UserError, brief
from diva_jax.common.json_files import packaged
from diva_jax.models.diffusion.schedule import ScheduleConfig
from diva_jax.models.diffusion.text_encoder import TextEncoderConfig
from diva_jax.models.diffusion.unet import UNetConfig
from diva_jax.models.diffusion.vae import VAEConfig
from diva_jax.models.layers import Array

# With the names and values of their diffusers folders' config files. Stable unCLIP (unclip_l, unclip_h) is conditioned
# on [image embedding, code of the embedding's noise level], OpenAI ViT-L/14's (768) and OpenCLIP ViT-H/14's (1024);
# tiny is for the demo and the tests.
PRESETS = packaged(__file__, "presets.json")


def preset(name: str) -> dict:
    """Returns a copy of a preset: {"unet": ..., "vae": ..., "text_encoder": ..., "scheduler": ...}."""
    return copy.deepcopy(PRESETS[name])


class LatentCode(Protocol):
    """The config of a frozen model that turns images into latents: a frozen dataclass with these members.

    The class of one's own is named by `config.diffusion.vae._class_name` or `config.genhancer.vae.code`."""

    latent_channels: int  # Channels of the latents.
    downscale: int  # Ratio of the image size to the size of the latents.
    moment_channels: int  # Channels of what the model's `moments` returns.

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "LatentCode":
        """Reads the section of the config and `vae/config.json` of the source, which must be equal; entries that begin
        with an underscore are metadata. A UserError where an option is unknown or impossible."""

    def build(self, *, rngs, dtype, param_dtype) -> nnx.Module:
        """The model: `encode(images)`, `moments(images)`, of [B, H, W, 3] in [-1, 1] -> [B, h, w, moment_channels]. Its
        parameters are read from `vae/diffusion_pytorch_model.safetensors` of the source, by PyTorch's names and layouts
        of the same path: `kernel` is `weight`, transposed."""

    def latents(self, moments: Array, noise: Array | None = None) -> Array:
        """The latents for the generator, [..., latent_channels]; `noise`: standard normal, of their shape, or None."""


def find_code(path: str, field: str) -> type[LatentCode]:
    """Imports a class by its dotted path, the value of this field of the config, which a UserError names."""
    module, _, name = path.rpartition(".")
    wanted = "give the dotted path of a class on PYTHONPATH"
    found = getattr(config_files.module(module, field, wanted), name, None)
    if found is None:
        raise UserError(f"{field}={brief(path)} cannot be imported (there is no {name}): {wanted}")
    return found


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """A Stable Diffusion model, see `config.DiffusionOptions`."""

    source: str
    prompt: str
    text_tokens: int
    unet: UNetConfig
    vae: LatentCode
    text_encoder: TextEncoderConfig
    scheduler: ScheduleConfig

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "Diffusion":
        """Parses the content of `config.diffusion`; a UserError for an option that is not implemented here."""
        name = str(options["vae"].get("_class_name", ""))
        vae = find_code(name, "config.diffusion.vae._class_name") if "." in name else VAEConfig
        kinds = dict(unet=UNetConfig, vae=vae, text_encoder=TextEncoderConfig, scheduler=ScheduleConfig)
        own = {name: options[name] for name in ("source", "prompt", "text_tokens")}
        return cls(**own, **{part: kind.from_dict(options[part]) for part, kind in kinds.items()})
