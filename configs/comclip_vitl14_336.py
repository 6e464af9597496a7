r"""ComCLIP on OpenAI CLIP ViT-L/14 at 336 px: images with captions, the untuned tower, and DINOv2's similarities.

    python -m diva_jax.main --config=configs/comclip_vitl14_336.py --workdir=runs/comclip_vitl14_336 \
        --config.data.path='data/cc3m/{00000..00331}.tar'

One epoch of CC3M, 1,024 images with captions per step. No code of the authors could be read.

No scores are published at 336 px; the recipe is that of 224.
"""

from diva_jax import config

# So that 64 images fit into a 16 GiB chip.
get_config = config.published("vitl14_336", objective="comclip", fields={"remat": "vision"})
