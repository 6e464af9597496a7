"""FLUX's autoencoder: names in checkpoints, and its source."""

from pathlib import Path

import numpy as np

from diva_jax.models.diffusion.vae import FluxVAEConfig
from diva_jax.weights import names, places, readers
from diva_jax.weights.parts import Opened, Part, open_diffusers
from diva_jax.weights.readers import Tensor, Tensors

FILE = "ae.safetensors"

# The names of Black Forest Labs' own files.
VAE = names.Table(
    "encoder of FLUX's autoencoder",
    rename=(
        (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
        (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
        (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
        (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
        (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
        (r"\.mid_block\.attentions\.0\.to_(q|k|v)\.", r".mid.attn_1.\1."),
        (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
        (r"\.conv_norm_out\.", ".norm_out."),
        (r"\.conv_shortcut\.", ".nin_shortcut."),
    ),
    ignore=(r"decoder\..*",),
)


def with_matrices(tensors: Tensors) -> Tensors:
    """The attention's 1x1 convolutions [n, n, 1, 1] as matrices [n, n]."""

    def squeezed(tensor) -> Tensor:
        return Tensor(tensor.shape[:2], tensor.dtype, lambda: np.asarray(tensor).reshape(tensor.shape[:2]))

    attn = ".mid.attn_1."
    matrices = {n: squeezed(t) if attn in n and tuple(t.shape[2:]) == (1, 1) else t for n, t in tensors.items()}
    return Tensors(matrices, tensors.files)


def vae(source: str, config: FluxVAEConfig, field: str) -> Part:
    """The encoder of FLUX's autoencoder, of `ae.safetensors`, a folder that holds it, a diffusers folder (the
    pipeline's or `vae`), or a hub id; `field` is the config section of both."""

    def opened():
        at = places.locate(source, f"{field}.source")
        at = at if isinstance(at, Path) else places.download(at, f"{field}.source", [FILE])
        at = at / FILE if (at / FILE).is_file() else at
        if at.is_dir():
            return open_diffusers(at, config, field)
        tensors = with_matrices(readers.open_file(at))
        return Opened(tensors.files, lambda state, put: names.assign(state, tensors, VAE, source=str(at), put=put))

    return Part(source, opened)
