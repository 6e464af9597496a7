r"""ComCLIP on OpenAI CLIP ViT-L/14 at 224 px: images with captions, the untuned tower, and DINOv2's similarities.

    python -m diva_jax.main --config=configs/comclip_vitl14.py --workdir=runs/comclip_vitl14 \
        --config.data.path='data/cc3m/{00000..00331}.tar'

One epoch of CC3M, 1,024 images with captions per step. No code of the authors could be read.
Published (224 px): MMVP-VLM 17.8 -> 24.2 +- 0.9 (three seeds), ImageNet zero-shot 75.5 -> 76.1.
"""

from diva_jax import config

# So that 64 images fit into a 16 GiB chip.
get_config = config.published("vitl14", objective="comclip", fields={"remat": "vision"})
