r"""DCR on OpenAI CLIP ViT-L/14 at 224 px.

    python -m diva_jax.main --config=configs/dcr_vitl14.py --workdir=runs/dcr_vitl14 \
        --config.data.path='data/cc3m/{00000..00331}.tar'

CC3M, 256 images per step in groups of 16: 100,000 steps of the projector, then 4,600 of the tower's adapters; Stable
Diffusion 2.1-base.
Cost: not published; 5.4 TFLOP per image in stage 2, counted.
MMVP-VLM, published: 19.2 -> 33.3.
"""

from diva_jax import config

# So that 16 images per chip, each in two views, fit into 16 GiB.
get_config = config.published("vitl14", objective="dcr", fields={"remat": "vision"})
