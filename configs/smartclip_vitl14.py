r"""SmartCLIP on OpenAI CLIP ViT-L/14 at 224 px: the whole model on long captions, 248 tokens.

    python -m diva_jax.main --config=configs/smartclip_vitl14.py --workdir=runs/smartclip_vitl14 \
        --config.data.path='data/sharegpt4v/{00000..00127}.tar'

Three epochs of 1.2 million images with long captions, 1,024 per step. The method is implemented from its description
in arXiv 2507.22264; no code of the authors could be read.
"""

from diva_jax import config

# Of both towers, so that 64 images and captions fit into a 16 GiB chip.
get_config = config.published("vitl14", objective="smartclip", fields={"remat": "vision"})
