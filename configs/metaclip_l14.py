r"""DIVA on MetaCLIP ViT-L/14 at 224 px.

    python -m diva_jax.main --config=configs/metaclip_l14.py --workdir=runs/metaclip_l14 \
        --config.data.path='data/cc3m/{00000..00331}.tar'

About one epoch of CC3M, 640 images per step; Stable Diffusion 2.1-base.
MMVP-VLM, published: 23.7 -> 27.4.
"""

from diva_jax import config

get_config = config.published("metaclip_l14")
