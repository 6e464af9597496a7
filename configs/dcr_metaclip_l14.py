r"""DCR on MetaCLIP ViT-L/14 at 224 px.

    python -m diva_jax.main --config=configs/dcr_metaclip_l14.py --workdir=runs/dcr_metaclip_l14 \
        --config.data.path='data/cc3m/{00000..00331}.tar'

CC3M, 256 images per step in groups of 16: 100,000 steps of the projector, then 100,000 of the tower's adapters; Stable
Diffusion 2.1-base.
Cost: not published; 5.4 TFLOP per image in stage 2, counted.
MMVP-VLM, published: 23.7 -> 32.6.
"""

from diva_jax import config

FIELDS = {
    "steps": 100_000,
    "remat": "vision",  # So that 16 images per chip, each in two views, fit into 16 GiB.
}
get_config = config.published("metaclip_l14", objective="dcr", fields=FIELDS)
