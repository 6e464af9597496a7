r"""KUEA on OpenAI CLIP ViT-L/14 at 224 px: its embeddings' kernel is brought to that of DINOv2 ViT-L/14.

    python -m diva_jax.main --config=configs/kuea_vitl14.py --workdir=runs/kuea_vitl14 \
        --config.data.path='tfds:imagenet2012/train'

Two epochs of ImageNet-1K, 64 images per step.
Published: mean of 12 zero-shot sets 65.26 -> 66.54.
"""

from diva_jax import config

get_config = config.published("vitl14", objective="kuea")
