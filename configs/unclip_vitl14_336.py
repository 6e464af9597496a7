r"""un²CLIP on OpenAI CLIP ViT-L/14 at 336 px, through Stable unCLIP L.

    python -m diva_jax.main --config=configs/unclip_vitl14_336.py --workdir=runs/unclip_vitl14_336 \
        --config.data.path='data/cc3m/{00000..00331}.tar'

The generator was trained with the embeddings of the encoder at 224 px. About one epoch of CC3M in steps of 32 images,
AdamW at 3e-7. What is not known of the published recipe: see configs/unclip_vitl14.py.
Cost: not published. 8.5 TFLOP per image, 25 EFLOP in all.
MMVP-VLM, published: not quoted, as no source of it was at hand.
"""

from diva_jax import config

get_config = config.published("vitl14_336", "unclip_l", "unclip")
