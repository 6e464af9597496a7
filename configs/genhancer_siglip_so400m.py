r"""GenHancer (continuous) on SigLIP SO400M/14 at 224 px.

    python -m diva_jax.main --config=configs/genhancer_siglip_so400m.py --workdir=runs/genhancer_siglip \
        --config.data.path='data/cc3m/{00000..00331}.tar'

100,000 steps of the denoiser and the projectors, then 10,000 of the encoder's adapters, of 256 images.
docs/OBJECTIVES.md says how to run stage 2 alone. What is trained is split over mesh.fsdp=16 chips, 1.4 GiB on each.
Cost: 1.24 and 1.21 TFLOP per image in stage 1 and 2.
MMVP-VLM, published: arXiv 2503.19480, table 1.
"""

from diva_jax import config

get_config = config.published("siglip_so400m", objective="genhancer", fields={"mesh.fsdp": 16})
