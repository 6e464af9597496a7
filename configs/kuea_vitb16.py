r"""KUEA on OpenAI CLIP ViT-B/16 at 224 px: its embeddings' kernel is brought to that of DINOv2 ViT-L/14.

    python -m diva_jax.main --config=configs/kuea_vitb16.py --workdir=runs/kuea_vitb16 \
        --config.data.path='tfds:imagenet2012/train'

Two epochs of ImageNet-1K, 128 images per step.
The published gamma and c of ViT-B/16 are not known to us; those of ViT-L/14 are the initial values here.
"""

from diva_jax import config
from diva_jax.models import backbones

get_config = config.published(backbones.VIT_B16, objective="kuea", fields={"steps": 20_000, "batch_size": 128})
