r"""DIVA on SigLIP SO400M/14 at 384 px.

    python -m diva_jax.main --config=configs/siglip_so400m_384.py --workdir=runs/siglip_so400m_384 \
        --config.data.path='data/cc3m/{00000..00331}.tar'

About one epoch of CC3M, 640 images per step; Stable Diffusion 2.1-base.
MMVP-VLM, published: 37.0 -> 38.5.
"""

from diva_jax import config

# So that eight images a micro-batch fit into a 16 GiB chip.
get_config = config.published("siglip_so400m_384", fields={"remat": "vision"})
