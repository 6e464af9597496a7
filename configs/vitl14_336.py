r"""DIVA on OpenAI CLIP ViT-L/14 at 336 px.

    python -m diva_jax.main --config=configs/vitl14_336.py --workdir=runs/vitl14_336 \
        --config.data.path='data/cc3m/{00000..00331}.tar'

About one epoch of CC3M, 640 images per step; Stable Diffusion 2.1-base.
MMVP-VLM, published: 20.0 -> 25.2.
"""

from diva_jax import config

# So that eight images a micro-batch fit into a 16 GiB chip.
get_config = config.published("vitl14_336", fields={"remat": "vision"})
