"""Golden files of DIVA: one forward and backward pass of the authors' code, over tiny random modules.

A file contains inputs, weights, every random draw and the results of that code.
The U-Net and VAE are those of sd_tiny_7.npz.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from helpers import filled
from reading import differentiate, diffusion_config, fill_generator, gradients, take, tower_spec

from diva_jax import config
from diva_jax.models import backbones
from diva_jax.models.layers import abstract
from diva_jax.objectives import diva
from diva_jax.training import partition
from diva_jax.weights import names

RESULTS = ("latents", "features", "context", "pred_noise", "losses", "grad")
# Values that do not follow from the arrays, by prefix of the file's name: heads or their width, window of pooling.
HEADS = {"OpenAICLIP": ("heads", 4), "MetaCLIP": ("width", 16), "DFN": ("width", 32), "SigLIP": ("heads", 4)}
PREFIX = tuple(HEADS)
WINDOWS = (6, 10)


def vision_spec(name: str, z) -> backbones.Spec:
    siglip = any(k.startswith("w/visual.trunk.") for k in z.files)
    kind, n = next(v for prefix, v in HEADS.items() if name.startswith(prefix))
    spec = tower_spec(take(z, "w/"), "siglip" if siglip else "vit")
    tokens, text = z["features/0"].shape[1], z["text_context"].shape[1]
    select = "all"
    if "token_indices/0" in z.files:
        select = f"random:{z['token_indices/0'].shape[1]}"
    elif siglip:
        select = next(f"runs:{w}" for w in WINDOWS if diva.token_count(f"runs:{w}", spec.patches) == tokens)
    add_text = "token" if select.startswith("random") and tokens == text else "mean"
    heads = n if kind == "heads" else spec.width // n
    return dataclasses.replace(spec, heads=heads, select=select, add_text=add_text)


def compare(path, z, sd):
    n = len(z["losses"])
    c = config.default(vision_spec(path.stem, z), diffusion_config())
    c.update(dtype="float32", frozen_dtype="float32", accum=1)
    c.diva.draws, c.diffusion.text_tokens = n, z["text_context"].shape[1]
    module = abstract(lambda rngs: diva.Objective(config.faithful(c), rngs=rngs))
    projection = names.Table("visual_proj", ((r"^", "visual_proj."),), ignore=(r"visual\..*",))
    vision = names.table("vision", module.spec)
    vision = vision._replace(ignore=(*vision.ignore, r"visual_proj\..*"))
    tables = {"vision": vision, "visual_proj": projection}
    for part, table in tables.items():
        setattr(module, part, filled(getattr(module, part), take(z, "w/"), table))
    fill_generator(module, sd, z["text_context"])

    def stack(key):
        return jnp.stack([jnp.asarray(z[f"{key}/{k}"]) for k in range(n)])

    indices = stack("token_indices") if "token_indices/0" in z.files else None
    drawn = diva.DivaDraws(stack("timesteps"), stack("noise"), indices)
    skeleton, arrays = partition.disassemble(module)
    trained, pixels = [n for n in arrays if n.split("/")[0] in tables], jnp.asarray(z["pixels"])
    (_, seen), grads = differentiate(skeleton, arrays, trained.__contains__, lambda m: m.forward(pixels, drawn))
    out = {"latents": seen["latents"], "losses": seen["losses"]}
    for key in ("features", "context", "pred_noise"):
        out |= {f"{key}/{k}": seen[key][k] for k in range(n)}
    for part, table in tables.items():
        out |= {f"grad/{k}": np.asarray(v) for k, v in gradients(skeleton, grads, part, table).items()}
    return {k: z[k] for k in z.files if k.split("/")[0] in RESULTS}, out, {}
