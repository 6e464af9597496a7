r"""un²CLIP on OpenCLIP ViT-H/14 (LAION-2B) at 224 px, through Stable unCLIP H.

    python -m diva_jax.main --config=configs/unclip_h14.py --workdir=runs/unclip_h14 \
        --config.data.path='data/cc3m/{00000..00331}.tar'

About one epoch of CC3M in steps of 32 images, AdamW at 3e-7. What is not known of the published recipe: see
configs/unclip_vitl14.py.
Cost: not published. 8.3 TFLOP per image, 25 EFLOP in all.
MMVP-VLM, published: not quoted, as no source of it was at hand.
"""

import dataclasses

from diva_jax import config
from diva_jax.models import backbones

# The generator's own image encoder: exact GELU, and OpenAI's mean and std.
LAION_H14 = dataclasses.replace(
    backbones.TABLE["metaclip_h14"],
    open_clip_name="ViT-H-14",
    source="hf-hub:laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    activation="gelu",
    readout="pooled",
)
# So that what is trained fits into 16 GiB chips; elsewhere --config.mesh.fsdp=1.
FIELDS = {"mesh.fsdp": 4, "mesh.shard_frozen": False, "remat": "vision"}
FIELDS |= {"diffusion.source": "sd2-community/stable-diffusion-2-1-unclip"}
get_config = config.published(LAION_H14, "unclip_h", "unclip", FIELDS)
