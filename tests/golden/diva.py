"""Golden files of DIVA: one forward and backward pass of the authors' code, over tiny random modules.

A file contains inputs, weights, every random draw and the results of that code.
The U-Net and VAE are those of sd_tiny_7.npz.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from helpers import filled
from reading import gradients, rows, take, tower_spec

from diva_jax import config
from diva_jax.models import backbones
from diva_jax.models.layers import abstract
from diva_jax.objectives import diva
from diva_jax.training import partition
from diva_jax.weights import clip, names

# Relative L2 error.
BOUNDS = {"latents": 5e-6, "features": 5e-6, "context": 5e-6, "pred_noise": 1e-5, "losses": 1e-5, "grad": 2e-5}
# Values that do not follow from the arrays, by prefix of the file's name: heads or their width, window of pooling.
HEADS = {"OpenAICLIP": ("heads", 4), "MetaCLIP": ("width", 16), "DFN": ("width", 32), "SigLIP": ("heads", 4)}
WINDOWS = (6, 10)
SD = dict(unet_heads=(2, 2, 4, 4), unet_groups=8, vae_groups=4)


def vision_spec(name: str, z) -> backbones.Spec:
    """Returns the backbone of a golden file."""
    siglip = any(k.startswith("w/visual.trunk.") for k in z.files)
    kind, n = next(v for prefix, v in HEADS.items() if name.startswith(prefix))
    spec = tower_spec(take(z, "w/"), "siglip" if siglip else "vit")
    tokens, text = z["features/0"].shape[1], z["text_context"].shape[1]
    if "token_indices/0" in z.files:
        select = f"random:{z['token_indices/0'].shape[1]}"
    elif siglip:
        select = next(f"runs:{w}" for w in WINDOWS if diva.token_count(f"runs:{w}", spec.patches) == tokens)
    else:
        select = "all"
    add_text = "token" if select.startswith("random") and tokens == text else "mean"
    heads = n if kind == "heads" else spec.width // n
    return dataclasses.replace(spec, heads=heads, select=select, add_text=add_text)


def diffusion_config(sd) -> dict:
    """Returns the sizes of U-Net and VAE, in diffusers' terms, from their state dicts."""

    def widths(part, key):
        n = 1 + max(int(k.split("down_blocks.")[1].split(".")[0]) for k in sd.files if f"{part}down_blocks." in k)
        return tuple(sd[f"{part}down_blocks.{i}.resnets.0.{key}"].shape[0] for i in range(n))

    unet = dict(
        in_channels=sd["unet/conv_in.weight"].shape[1],
        out_channels=sd["unet/conv_out.weight"].shape[0],
        block_out_channels=widths("unet/", "conv1.weight"),
        layers_per_block=2,
        attention_head_dim=SD["unet_heads"],
        cross_attention_dim=sd["unet/down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        use_linear_projection=sd["unet/down_blocks.0.attentions.0.proj_in.weight"].ndim == 2,
        norm_num_groups=SD["unet_groups"],
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    channels = widths("vae/encoder.", "conv1.weight")
    vae = dict(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        layers_per_block=2,
        norm_num_groups=SD["vae_groups"],
        latent_channels=sd["vae/quant_conv.weight"].shape[0] // 2,
    )
    preset = config.default().diffusion
    return dict(unet=unet, vae=vae, text_encoder=preset.text_encoder.to_dict(), scheduler=preset.scheduler.to_dict())


def objective(name: str, z, sd):
    """Returns the objective with a golden file's weights, in float32, with every switch `faithful`."""
    c = config.default(vision_spec(name, z), diffusion_config(sd))
    c.update(dtype="float32", frozen_dtype="float32", accum=1)
    c.diva.draws = len(z["losses"])
    c.diffusion.text_tokens = z["text_context"].shape[1]
    module = abstract(lambda rngs: diva.Objective(config.faithful(c), rngs=rngs))
    own = take(z, "w/")
    projection = names.Table("visual_proj", ((r"^", "visual_proj."),), ignore=(r"visual\..*",))
    vision = clip.vision_table(module.spec)
    vision = dataclasses.replace(vision, ignore=(*vision.ignore, r"visual_proj\..*"))
    module.vision = filled(module.vision, own, vision)
    module.visual_proj = filled(module.visual_proj, own, projection)
    module.unet = filled(module.unet, take(sd, "unet/"), names.UNET)
    module.vae = filled(module.vae, take(sd, "vae/"), names.VAE)
    module.text_context = nnx.Variable(jnp.asarray(z["text_context"]))
    return module, {"vision": vision, "visual_proj": projection}


def compute(name: str, z, sd) -> dict[str, np.ndarray]:
    """Computes every recorded quantity, by its name in the file."""
    module, tables = objective(name, z, sd)
    n = len(z["losses"])

    def stack(key):
        return jnp.stack([jnp.asarray(z[f"{key}/{k}"]) for k in range(n)])

    indices = stack("token_indices") if "token_indices/0" in z.files else None
    drawn = diva.DivaDraws(stack("timesteps"), stack("noise"), indices)
    skeleton, arrays = partition.disassemble(module)
    trained = {k: v for k, v in arrays.items() if k.startswith(("vision/", "visual_proj/"))}
    frozen = {k: v for k, v in arrays.items() if k not in trained}

    def loss(trained):
        return skeleton.merge(trained, frozen).forward(jnp.asarray(z["pixels"]), drawn)

    with jax.default_matmul_precision("highest"):
        (_, seen), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained)
    out = {"latents": seen["latents"], "losses": seen["losses"]}
    for key in ("features", "context", "pred_noise"):
        out |= {f"{key}/{k}": seen[key][k] for k in range(n)}
    for part, table in tables.items():
        out |= {f"grad/{k}": v for k, v in gradients(skeleton, grads, part, table).items()}
    return {k: np.asarray(v) for k, v in out.items()}


def reads(name: str) -> bool:
    return name.startswith(tuple(HEADS))


def errors(golden: Path, sd: Path) -> list[tuple[str, float, float]]:
    z, states = np.load(golden), np.load(sd)
    ours = compute(golden.stem, z, states)
    recorded = {k: z[k] for k in z.files if k.split("/")[0] in BOUNDS}
    return rows(recorded, ours, lambda key: BOUNDS[key.split("/")[0]])
