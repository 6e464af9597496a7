r"""GenHancer (continuous) on OpenAI CLIP ViT-L/14 at 224 px.

    python -m diva_jax.main --config=configs/genhancer_vitl14.py --workdir=runs/genhancer_vitl14 \
        --config.data.path='data/cc3m/{00000..00331}.tar'

100,000 steps of the denoiser and the projectors, then 10,000 of the encoder's adapters, of 256 images.
docs/OBJECTIVES.md says how to run stage 2 alone. What is trained is split over mesh.fsdp=16 chips, 1.4 GiB on each.
Cost: 1.19 and 1.10 TFLOP per image in stage 1 and 2.
MMVP-VLM, published: 6.0 above DIVA's 25.9.
"""

from diva_jax import config

get_config = config.published("vitl14", objective="genhancer", fields={"mesh.fsdp": 16})
