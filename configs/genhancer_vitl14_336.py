r"""GenHancer (continuous) on OpenAI CLIP ViT-L/14 at 336 px.

    python -m diva_jax.main --config=configs/genhancer_vitl14_336.py --workdir=runs/genhancer_vitl14_336 \
        --config.data.path='data/cc3m/{00000..00331}.tar'

100,000 steps of the denoiser and the projectors, then 10,000 of the encoder's adapters, of 256 images.
docs/OBJECTIVES.md says how to run stage 2 alone. What is trained is split over mesh.fsdp=16 chips, 1.4 GiB on each.
Cost: 2.70 and 2.54 TFLOP per image in stage 1 and 2.
MMVP-VLM, published: arXiv 2503.19480, table 1.
"""

from diva_jax import config

FIELDS = {
    "mesh.fsdp": 16,
    "remat": "vision",  # The encoder has many tokens or layers, whose activations would not all fit.
}
get_config = config.published("vitl14_336", objective="genhancer", fields=FIELDS)
