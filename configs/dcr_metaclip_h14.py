r"""DCR on MetaCLIP ViT-H/14 at 224 px.

    python -m diva_jax.main --config=configs/dcr_metaclip_h14.py --workdir=runs/dcr_metaclip_h14 \
        --config.data.path='data/cc3m/{00000..00331}.tar'

CC3M, 256 images per step in groups of 16: 100,000 steps of the projector, then 100,000 of the tower's adapters; Stable
Diffusion 2.1-base.
Cost: not published; 6.2 TFLOP per image in stage 2, counted.
MMVP-VLM, published: 25.2 -> 37.8.
"""

from diva_jax import config

FIELDS = {
    "steps": 100_000,
    "remat": "vision",  # So that 16 images per chip, each in two views, fit into 16 GiB.
}
get_config = config.published("metaclip_h14", objective="dcr", fields=FIELDS)
