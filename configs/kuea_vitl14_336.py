r"""KUEA on OpenAI CLIP ViT-L/14 at 336 px: its embeddings' kernel is brought to that of DINOv2 ViT-L/14.

    python -m diva_jax.main --config=configs/kuea_vitl14_336.py --workdir=runs/kuea_vitl14_336 \
        --config.data.path='tfds:imagenet2012/train'

Two epochs of ImageNet-1K, 32 images per step.
MMVP-VLM, published: 20.0 -> 21.5.
"""

from diva_jax import config

get_config = config.published("vitl14_336", objective="kuea", fields={"steps": 80_000, "batch_size": 32})
