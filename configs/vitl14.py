r"""DIVA on OpenAI CLIP ViT-L/14 at 224 px, the paper's main model.

    python -m diva_jax.main --config=configs/vitl14.py --workdir=runs/vitl14 \
        --config.data.path='data/cc3m/{00000..00331}.tar'

About one epoch of CC3M, 640 images per step; Stable Diffusion 2.1-base.
Cost: 66 A100-80G GPU hours (published).
MMVP-VLM, published: 19.3 -> 25.9.
"""

from diva_jax import config

get_config = config.published("vitl14")
