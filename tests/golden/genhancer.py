"""Golden files of GenHancer (continuous): forward pass, gradients of both stages, and FLUX's encoder, on tiny modules.

A case consists of NAME.npz (draws, weights, forward pass), NAME_grad1.npz and NAME_stage2.npz, and has its encoder in
genhancer_vae.npz, all in one folder. Latents are given where that has none. A tower may be SigLIP's; then all switches
of it are faithful, but a merged tower has the adapter of the head's output, whose values are not zero in a file.
"""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from helpers import filled
from reading import PROJECTOR, differentiate, from_hf, gradients, hf_names, hf_spec, hf_tensors, take

from diva_jax import config
from diva_jax.data import preprocess
from diva_jax.models import adapters
from diva_jax.models.diffusion import flow
from diva_jax.models.diffusion.vae import VAE, FluxVAEConfig
from diva_jax.models.layers import abstract
from diva_jax.objectives import genhancer
from diva_jax.training import partition
from diva_jax.weights import names, parts
from diva_jax.weights.formats import Tensors

# Names in the authors' checkpoints.
_DENOISER = ((r"_mlp\.fc1\.", "_mlp.0."), (r"_mlp\.fc2\.", "_mlp.2."))
_DENOISER += ((r"\.(query|key)_norm\.weight$", r".\1_norm.scale"), (r"\.adaLN_modulation\.", ".adaLN_modulation.1."))
# Part of the objective -> (its prefix in a file, its table).
GENERATOR = {"project_clip": ("project_clip.", PROJECTOR), "project_t5": ("project_t5.", PROJECTOR)}
GENERATOR["denoiser"] = ("dit.", names.Table("FLUX's transformer", _DENOISER))

PREFIX = "genhancer"
PARTS = ("_grad1", "_stage2")
HEADS = 4  # Of every vision tower; the arrays do not tell.
# What a file records and is no result.
GIVEN = ("meta", "pixels", "draw/", "w/", "lora/", "deep/pixels", "deep/posterior", "a/w/", "deep/w/")


def read_all(folder: Path, name: str):
    """(arrays, `meta`, arrays of the VAE's encoder, its sizes) of a case of a folder."""
    arrays, meta = {}, {}
    for end in ("", *PARTS):
        z = np.load(folder / f"{name}{end}.npz")
        arrays |= {k: z[k] for k in z.files if k != "meta"}
        meta |= json.loads(str(z["meta"]))
    if "draw/posterior" not in arrays:
        return arrays, meta, None, FluxVAEConfig(latent_channels=arrays["latents"].shape[-1])
    return arrays, meta, *encoder_of(np.load(folder / "genhancer_vae.npz"), name.removeprefix("genhancer_"))


def settings(arrays, meta, vae: FluxVAEConfig, adapted: bool, head_out: str = "faithful"):
    dit = meta["dit"]
    c = config.default(hf_spec(take(arrays, "w/model."), heads=HEADS), objective="genhancer")
    c.update(dtype="float32", frozen_dtype="float32")
    c.data.latents = "" if "draw/posterior" in arrays else "given"
    c.genhancer.update(scale_factor=float(meta["scale_factor"]), guidance=float(meta["guidance"]))
    c.genhancer.update(siglip_gelu="faithful", siglip_head_out=head_out)
    c.genhancer.stage2 = "all" if adapted else "none"
    sizes = dict(in_channels="in_channels", width="hidden_size", heads="num_heads", double_blocks="depth")
    sizes = {ours: dit[theirs] for ours, theirs in (sizes | dict(single_blocks="depth_single_blocks")).items()}
    sizes |= dict(vector_dim=meta["clip_dim"], text_dim=meta["t5_dim"], axes=tuple(dit["axes_dim"]))
    c.genhancer.denoiser.update(sizes)
    c.genhancer.vae.update(dataclasses.asdict(vae))
    if adapted:
        c.genhancer.lora.update(rank=meta["rank"], alpha=float(meta["lora_alpha"]), dropout=0.0)
    return c


def made(arrays, c, encoder: Tensors | None) -> tuple[partition.Skeleton, dict[str, jax.Array]]:
    module = abstract(lambda rngs: genhancer.Objective(c, rngs=rngs))
    skeleton, _ = partition.disassemble(module)
    tower = Tensors(from_hf(take(arrays, "w/model."), module.spec), [])
    sources = {"vision": (tower, names.table("vision", module.spec)), "vae": (encoder, names.FLUX_VAE)}
    sources |= {part: (take(arrays, f"w/{prefix}"), table) for part, (prefix, table) in GENERATOR.items()}
    out = {}
    for name, (path, _) in skeleton.variables.items():
        part, *inner = path
        if "lora" in inner:
            out[name] = jnp.stack([arrays[f"lora/model.{n}".removesuffix(".weight")].T for n in hf_names(inner)])
        else:
            tensors, table = sources[part]
            out[name] = jnp.asarray(names.from_torch_layout(path, np.asarray(tensors[table.torch_name(tuple(inner))])))
    return skeleton, out


@functools.cache
def computed(folder: Path, name: str) -> tuple[dict, dict]:
    """Returns the arrays of a case of a folder and what we compute of it, once for all its files."""
    a, meta, encoder, sizes = read_all(folder, name)
    pixels, freqs = jnp.asarray(a["pixels"]), a["f/freqs"]
    drawn = (jnp.asarray(a.get(f"draw/{k}", a["latents"])) for k in ("posterior", "t_normal", "noise"))
    drawn = genhancer.GenHancerDraws(*drawn)
    skeleton, weights = made(a, settings(a, meta, sizes, adapted=False), encoder)
    latents = jnp.asarray(a["latents"])
    if encoder is not None:
        latents = jax.jit(lambda w: skeleton.merge(w).latents(pixels, drawn.posterior))(weights)
    loss = lambda module: module.forward(pixels, latents, drawn, freqs)  # noqa: E731
    trains = lambda n: not n.startswith(("vision/", "vae/"))  # noqa: E731
    (value, seen), grads = differentiate(skeleton, weights, trains, loss)
    out = {"latents": latents, "loss": value} | {f"f/{k}": v for k, v in seen.items()}
    out |= beside_the_forward(skeleton.merge(weights), pixels, latents.shape, seen, freqs)
    out |= generator("grad1", skeleton, grads)
    c = settings(a, meta, sizes, adapted=True)
    skeleton, weights = made(a, c, encoder)
    scales = partition.scales(genhancer.stages(c)[-1].trainable, weights)
    (value, seen), grads = differentiate(skeleton, weights, lambda n: scales[n] > 0, loss)
    out |= {"loss2": value} | {f"f2/{k}": seen[k] for k in ("embed", "vec", "txt", "pred")}
    whole, weights = made(a, settings(a, meta, sizes, adapted=True, head_out="exact"), encoder)
    return a, out | stage2(skeleton, whole.merge(weights), pixels, grads)


def beside_the_forward(module, pixels, latents, seen, freqs) -> dict:
    """What the objective does not return: the tower's hidden states, ids, codes, the rotations."""
    count, grid = len(pixels), (latents[1] // 2, latents[2] // 2)
    view = preprocess.normalise(pixels, module.spec.mean, module.spec.std)
    norm, caught = module.vision.norm, []

    def tap(x):
        caught.append((x, norm(x)))
        return caught[-1][1]

    module.vision.norm = tap
    module.vision.encode(view)
    before, after = caught[0]
    ids = np.broadcast_to(flow.token_positions(grid), (count, 1 + grid[0] * grid[1], 3))
    cos, sin = flow.rotations(module.flow_config, grid)
    turns = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
    t, guidance = seen["t"], jnp.full_like(seen["t"], module.options.guidance)
    found = dict(last_hidden=before, pooled=after[:, 0], txt_ids=ids[:, :1], img_ids=ids[:, 1:], guidance=guidance)
    if module.spec.arch == "siglip":
        found |= dict(last_hidden=after, pooled=seen["embed"])
    found |= {"dit.pe_embedder": np.broadcast_to(turns, (count, 1, *turns.shape)), "freqs": flow.frequencies()}
    found |= dict(timestep_code=flow.timestep_code(t, freqs), guidance_code=flow.timestep_code(guidance, freqs))
    half = flow.timestep_code(t.astype(jnp.bfloat16), freqs).astype(jnp.float32)
    return {f"f/{k}": v for k, v in found.items()} | {"clip_pixels": view, "bf16/timestep_code": half}


def generator(key: str, skeleton, grads) -> dict:
    """Gradients of projectors and denoiser under the file's names."""
    found = {prefix: gradients(skeleton, grads, part, table) for part, (prefix, table) in GENERATOR.items()}
    return {f"{key}/{prefix}{n}": g for prefix, of_part in found.items() for n, g in of_part.items()}


def stage2(skeleton, module, pixels, grads) -> dict:
    """Gradients with adapters, and the merged tower of `module`."""
    everything = generator("grad2all", skeleton, grads)
    out = {k: v for k, v in everything.items() if not k.startswith("grad2all/dit.")}
    dit = [np.sum(np.square(v, dtype=np.float64)) for k, v in everything.items() if k not in out]
    out["grad2all/dit_norm"] = np.sqrt(sum(dit))
    for name, gradient in grads.items():
        part, *path = name.split("/")
        if part == "vision":
            out |= {f"grad2/model.{n}".removesuffix(".weight"): t for n, t in hf_tensors(path, gradient).items()}
    tower, width = adapters.merge(module.vision), module.spec.width
    out["f2/merged_embed"] = tower.encode(preprocess.normalise(pixels, module.spec.mean, module.spec.std)).pooled
    first = tower.blocks[0].attn.qkv
    if module.spec.arch == "siglip":
        out["merged/head_out.weight"] = tower.attn_pool.proj.kernel[...].T
    return out | {"merged/q0.weight": first.kernel[...].T[:width], "merged/q0.bias": first.bias[...][:width]}


def encoder_of(z, case: str) -> tuple[Tensors, FluxVAEConfig]:
    meta = json.loads(str(z["meta"]))
    channels = tuple(meta["ch"] * m for m in meta[case]["ch_mult"])
    sizes = dict(latent_channels=meta[case]["z"], block_out_channels=channels, norm_num_groups=meta["groups"])
    sizes |= dict(layers_per_block=meta[case]["num_res_blocks"], scaling_factor=meta["scale_factor"])
    tensors = parts.with_matrices(Tensors(take(z, f"{case}/w/"), []))
    return tensors, FluxVAEConfig(**sizes, shift_factor=meta["shift_factor"])


def encoders(z) -> dict[str, np.ndarray]:
    """The results of the encoders of genhancer_vae.npz that have some there."""
    out = {}
    for case in sorted(k.removesuffix("/pixels") for k in z.files if k.endswith("/pixels")):
        tensors, sizes = encoder_of(z, case)
        vae = filled(abstract(lambda rngs, sizes=sizes: VAE(sizes, rngs=rngs)), tensors, names.FLUX_VAE)
        view = 2 * jnp.asarray(z[f"{case}/pixels"]) - 1
        out[f"{case}/moments"] = vae.moments(view)
        out[f"{case}/latents"] = vae.encode(view, jnp.asarray(z[f"{case}/posterior"]))
    return out


def compare(path, z, sd):
    """The error of the gradient of a key's bias, which is zero in truth, is relative to that of the query's."""
    recorded = {k: z[k] for k in z.files if not k.startswith(GIVEN)}
    if path.stem == "genhancer_vae":
        return recorded, encoders(z), {}
    arrays, ours = computed(path.parent, re.sub(f"({'|'.join(PARTS)})$", "", path.stem))
    keys = [k for k in recorded if re.fullmatch(r"grad2/.*\.k_proj\.bias", k)]
    scales = {k: arrays[k.replace("k_proj", "q_proj")] for k in keys}
    recorded |= {k: 0 * recorded[k] for k in keys}
    return recorded, {k: v for k, v in ours.items() if k in recorded}, scales
