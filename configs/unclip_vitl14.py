r"""un²CLIP on OpenAI CLIP ViT-L/14 at 224 px, through Stable unCLIP L.

    python -m diva_jax.main --config=configs/unclip_vitl14.py --workdir=runs/unclip_vitl14 \
        --config.data.path='data/cc3m/{00000..00331}.tar'

About one epoch of CC3M in steps of 32 images, AdamW at 3e-7. Not known of the published recipe: betas, weight decay,
warm-up, schedule, clip, precision, augmentation, and the options of config.unclip; see docs/OBJECTIVES.md.
Cost: not published. 7.8 TFLOP per image, 23 EFLOP in all.
MMVP-VLM, published: 19.3 -> 32.6 (as quoted by DCR).
"""

from diva_jax import config

get_config = config.published("vitl14", "unclip_l", "unclip")
