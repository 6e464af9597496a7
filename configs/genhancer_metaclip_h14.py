r"""GenHancer (continuous) on MetaCLIP ViT-H/14 at 224 px.

    python -m diva_jax.main --config=configs/genhancer_metaclip_h14.py --workdir=runs/genhancer_metaclip_h14 \
        --config.data.path='data/cc3m/{00000..00331}.tar'

Stage 1 trains the denoiser and the projectors for 100,000 steps, stage 2 the adapters of the encoder for 10,000, both
at 256 images; how to run stage 2 alone: docs/OBJECTIVES.md. With `:faithful` after the file name each switch is as in
the authors' code. Weights, moments and gradients are split over 16 chips (mesh.fsdp), 1.5 GiB on each with the frozen
weights; on n chips use --config.mesh.fsdp=n.

Cost: 1.36 and 1.45 TFLOP per image in stage 1 and 2.
MMVP-VLM, published: arXiv 2503.19480, table 1.
"""

from diva_jax import config

FIELDS = {
    "mesh.fsdp": 16,
    "remat": "vision",  # The encoder has many tokens or layers, whose activations would not all fit.
}
get_config = config.published("metaclip_h14", objective="genhancer", fields=FIELDS)
