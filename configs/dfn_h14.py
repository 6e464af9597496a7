r"""DIVA on DFN-5B ViT-H/14 at 224 px.

    python -m diva_jax.main --config=configs/dfn_h14.py --workdir=runs/dfn_h14 \
        --config.data.path='data/cc3m/{00000..00331}.tar'

About one epoch of CC3M, 640 images per step; Stable Diffusion 2.1-base.
MMVP-VLM, published: 39.3 -> 43.7.
"""

from diva_jax import config

# So that what is trained fits into 16 GiB chips; elsewhere --config.mesh.fsdp=1.
FIELDS = {"mesh.fsdp": 4, "mesh.shard_frozen": False, "remat": "vision"}
get_config = config.published("dfn_h14", fields=FIELDS)
