"""GenHancer against plain PyTorch: ten steps over both stages, another grid, and FLUX's encoder from every layout."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import close

from diva_jax.models.diffusion.vae import VAE, FluxVAEConfig
from diva_jax.models.layers import abstract
from diva_jax.weights import flux, names, writers

SIZES = dict(latent_channels=5, block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """(diffusers' model, the folder of its pipeline, a folder with the same weights in FLUX's own file)."""
    from diffusers import AutoencoderKL

    root = tmp_path_factory.mktemp("flux")
    torch.manual_seed(0)
    kind = dict(down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)
    shift = dict(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    model = AutoencoderKL(**SIZES, **kind, **shift).requires_grad_(False)
    model.save_pretrained(root / "pipeline" / "vae")
    config = FluxVAEConfig(**SIZES)
    ours = loaded(root / "pipeline", config)
    tensors = names.to_torch(ours, flux.VAE)
    convolutions = {n: a[:, :, None, None] if "attn_1" in n and a.ndim == 2 else a for n, a in tensors.items()}
    convolutions["decoder.conv_in.weight"] = np.zeros((1,), np.float32)
    (root / "own").mkdir()
    writers.write_safetensors(root / "own" / "ae.safetensors", convolutions)
    return model, root


def loaded(source, config) -> VAE:
    from flax import nnx

    graph, state = nnx.split(abstract(lambda rngs: VAE(config, rngs=rngs)))
    opened = flux.vae(str(source), config, "config.genhancer.vae").open()
    return nnx.merge(graph, opened.fill(state, lambda path, array, want: jnp.asarray(array)))


@pytest.mark.parametrize("where", ["pipeline", "pipeline/vae", "own", "own/ae.safetensors"])
def test_encoder_from_every_layout(layouts, where):
    model, root = layouts
    images = np.random.default_rng(0).uniform(-1, 1, (2, 28, 36, 3)).astype(np.float32)
    latents = model.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).latent_dist.mean
    want = 0.3611 * (latents - 0.1159)
    ours = loaded(root / where, FluxVAEConfig(**SIZES)).encode(jnp.asarray(images))
    close(np.asarray(ours).transpose(0, 3, 1, 2), want, 2e-5)
