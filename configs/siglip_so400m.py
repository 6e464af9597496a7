r"""DIVA on SigLIP SO400M/14 at 224 px.

    python -m diva_jax.main --config=configs/siglip_so400m.py --workdir=runs/siglip_so400m \
        --config.data.path='data/cc3m/{00000..00331}.tar'

About one epoch of CC3M, 640 images per step; Stable Diffusion 2.1-base.
MMVP-VLM, published: 37.8 -> 40.7.
"""

from diva_jax import config

# So that eight images a micro-batch fit into a 16 GiB chip.
get_config = config.published("siglip_so400m", fields={"remat": "vision"})
