r"""DIVA on MetaCLIP ViT-H/14 at 224 px.

    python -m diva_jax.main --config=configs/metaclip_h14.py --workdir=runs/metaclip_h14 \
        --config.data.path='data/cc3m/{00000..00331}.tar'

About one epoch of CC3M, 640 images per step; Stable Diffusion 2.1-base.
MMVP-VLM, published: 25.2 -> 31.9.
"""

from diva_jax import config

# So that what is trained fits into 16 GiB chips; elsewhere --config.mesh.fsdp=1.
FIELDS = {"mesh.fsdp": 4, "mesh.shard_frozen": False, "remat": "vision"}
get_config = config.published("metaclip_h14", fields=FIELDS)
