r"""GenHancer (continuous) on OpenAI CLIP ViT-L/14 at 224 px.

    python -m diva_jax.main --config=configs/genhancer_vitl14.py --workdir=runs/genhancer_vitl14 \
        --config.data.path='data/cc3m/{00000..00331}.tar'

Stage 1 trains the denoiser and the projectors for 100,000 steps, stage 2 the adapters of the encoder for 10,000, both
at 256 images. Stage 2 alone, from a run of stage 1:

    python -m diva_jax.main --config=configs/genhancer_vitl14.py --workdir=runs/only \
        --init_from=runs/genhancer_vitl14 --config.genhancer.stage1_steps=0 --config.data.path=...

With `:faithful` after the file name each switch is set as in the authors' code.

Memory: float32 weights, both moments of AdamW and the gradients are split over the 16 chips of a v5e-16 (mesh.fsdp),
1.4 GiB per chip with the frozen weights. On n chips use --config.mesh.fsdp=n.
Cost: 1.19 and 1.08 TFLOP per image in stage 1 and 2.
MMVP-VLM, published: 6.0 above DIVA's 25.9.
"""

from diva_jax import config as base


def get_config(arg: str | None = None):
    c = base.default("vitl14", objective="genhancer")
    c.mesh.fsdp = 16
    return base.variant(c, arg)
