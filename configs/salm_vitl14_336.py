r"""SALM on OpenAI CLIP ViT-L/14 at 336 px: the structure of DINOv2's patch tokens, from images alone.

    python -m diva_jax.main --config=configs/salm_vitl14_336.py --workdir=runs/salm_vitl14_336 \
        --config.data.path='tfds:imagenet2012/train'

Four epochs of ImageNet-1K, 16 images per step. No code of the authors of arXiv 2610.07689 could be read.
Published: ImageNet zero-shot 76.55 -> 77.21, ADE20K 36.96 -> 42.83, MMVP-VLM 20.0 -> 25.9.
"""

from diva_jax import config

get_config = config.published("vitl14_336", objective="salm")
