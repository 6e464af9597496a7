r"""The judge on OpenAI CLIP ViT-L/14 at 336 px: Stable Diffusion 2.1-base says which of two texts suits an image.

    python -m diva_jax.main --config=configs/judge_vitl14_336.py --workdir=runs/judge_vitl14_336 \
        --config.data.path='data/cc3m/{00000..00331}.tar'

Captions and their edits by one word (diva_jax/data/edits.json), 256 images per step. The method is ours and has not
been run at this size: docs/OBJECTIVES.md says what is known. Ask the judge first what it knows:
`python -m diva_jax.evaluate --task=judge`.
"""

from diva_jax import config

# So that each of sixteen chips has eight images at once, which fit into 16 GiB.
get_config = config.published("vitl14_336", objective="judge", fields={"accum": 2, "remat": "vision"})
