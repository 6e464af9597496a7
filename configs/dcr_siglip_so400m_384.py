r"""DCR on SigLIP SO400M/14 at 384 px.

    python -m diva_jax.main --config=configs/dcr_siglip_so400m_384.py --workdir=runs/dcr_siglip_so400m_384 \
        --config.data.path='data/cc3m/{00000..00331}.tar'

CC3M, 256 images per step in groups of 16: 100,000 steps of the projector, then 4,600 of the tower's adapters; Stable
Diffusion 2.1-base.

The tower has tanh's approximation of GELU, as it was trained and as transformers runs it; open_clip runs the exact
GELU. Weights are therefore taken from, and exported to, transformers' folders (--format=hf).
Cost: not published; 17.2 TFLOP per image in stage 2, counted.
MMVP-VLM, published: 37.0 -> 42.2.
"""

from diva_jax import config

FIELDS = {
    "backbone.source": "hf-hub:google/siglip-so400m-patch14-384",
    "backbone.activation": "gelu_tanh",
    "remat": "vision",  # So that 16 images per chip, each in two views, fit into 16 GiB.
    "dcr.tile": 8,  # Passes of the U-Net that fit beside it; they are computed twice.
}
get_config = config.published("siglip_so400m_384", objective="dcr", fields=FIELDS)
