"""DIVA at toy size, on a laptop CPU: real photographs, tiny towers with random weights. About two minutes.

    python -m diva_jax.demo --out=data/tiny          # writes the photographs and the towers
    python -m diva_jax.main --config=configs/tiny.py --workdir=runs/tiny
    python -m diva_jax.export_torch --workdir=runs/tiny --out=runs/tuned

It shows that every part works together, on the same files and readers as at full size. A random U-Net
knows nothing about images, so the loss says nothing about the method.
"""

from diva_jax import config as base
from diva_jax.models import backbones


def get_config(arg: str | None = None):
    c = base.default(backbones.TINY, "tiny")
    c.steps, c.batch_size, c.accum = 100, 16, 2
    c.dtype = c.frozen_dtype = "float32"
    c.backbone.source = "data/tiny/clip"
    c.diffusion.source = "data/tiny/stable-diffusion"
    c.data.path = "data/tiny/photos"
    c.data.image_size, c.data.threads = 64, 2
    c.optim.name, c.optim.lr, c.optim.warmup = "adamw", 1e-3, 0.05
    c.checkpoint.every, c.log.every = 50, 5
    return base.variant(c, arg)
