r"""DCR on MetaCLIP ViT-L/14 at 224 px.

    python -m diva_jax.main --config=configs/dcr_metaclip_l14.py --workdir=runs/dcr_metaclip_l14 \
        --config.data.path='data/cc3m/{00000..00331}.tar'

CC3M, 256 images per step in groups of 16: 100,000 steps of the projector, then 100,000 of the tower's adapters; Stable
Diffusion 2.1-base. With `:faithful` after the file name each switch is as in the authors' code.

Cost: not published; 5.7 TFLOP per image in stage 2, counted.
MMVP-VLM, published: 23.7 -> 32.6.
"""

from diva_jax import config as base


def get_config(arg: str | None = None):
    c = base.default("metaclip_l14", objective="dcr")
    c.steps = 100_000
    c.remat = "vision"  # So that 16 images per chip, each in two views, fit into 16 GiB.
    return base.variant(c, arg)
