r"""DCR on OpenAI CLIP ViT-L/14 at 336 px.

    python -m diva_jax.main --config=configs/dcr_vitl14_336.py --workdir=runs/dcr_vitl14_336 \
        --config.data.path='data/cc3m/{00000..00331}.tar'

CC3M, 256 images per step in groups of 16: 100,000 steps of the projector, then 4,600 of the tower's adapters; Stable
Diffusion 2.1-base.
Cost: not published; 13.1 TFLOP per image in stage 2, counted.
MMVP-VLM, published: 20.0 -> 31.1.
"""

from diva_jax import config

FIELDS = {
    "remat": "vision",  # So that 16 images per chip, each in two views, fit into 16 GiB.
    "dcr.tile": 8,  # Passes of the U-Net that fit beside it; they are computed twice.
}
get_config = config.published("vitl14_336", objective="dcr", fields=FIELDS)
