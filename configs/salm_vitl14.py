r"""SALM on OpenAI CLIP ViT-L/14 at 224 px: the structure of DINOv2's patch tokens, from images alone.

    python -m diva_jax.main --config=configs/salm_vitl14.py --workdir=runs/salm_vitl14 \
        --config.data.path='tfds:imagenet2012/train'

Four epochs of ImageNet-1K, 16 images per step. No code of the authors of arXiv 2610.07689 could be read.

The recipe is that of 336 px, for which scores are published.
"""

from diva_jax import config

get_config = config.published("vitl14", objective="salm")
