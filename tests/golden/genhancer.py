"""Golden files of GenHancer (continuous): forward pass, gradients of both stages, and FLUX's encoder, on tiny modules.

A case consists of NAME.npz (draws, weights, forward pass), NAME_grad1.npz and NAME_stage2.npz, which are looked for
beside the given file, then in `family`. A case with draws of the posterior takes its encoder from genhancer_vae.npz.
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
from reading import from_hf, hf_spec, relative, take

from diva_jax import config
from diva_jax.data import preprocess
from diva_jax.models import adapters, backbones
from diva_jax.models.diffusion import flow
from diva_jax.models.diffusion.vae import VAE, FluxVAEConfig
from diva_jax.models.layers import abstract
from diva_jax.objectives import genhancer
from diva_jax.training import partition
from diva_jax.weights import clip, flux, names
from diva_jax.weights.readers import Tensors

# Names in the authors' checkpoints.
DENOISER = names.Table(
    "FLUX's transformer",
    rename=(
        (r"_mlp\.fc1\.", "_mlp.0."),
        (r"_mlp\.fc2\.", "_mlp.2."),
        (r"\.(query|key)_norm\.weight$", r".\1_norm.scale"),
        (r"\.adaLN_modulation\.", ".adaLN_modulation.1."),
    ),
)
PROJECTOR = names.Table(
    "projector of GenHancer",
    rename=((r"^norm\.", "0."), (r"^fc1\.", "1."), (r"^fc2\.", "3.")),
)

FAMILY = Path(__file__).parent / "family"
PARTS = ("_grad1", "_stage2")
HEADS = 4  # Of every vision tower; the arrays do not tell.
# Relative L2 error, by the beginning of a quantity's name; the longest that fits.
BOUNDS = {
    "": 5e-6,
    "f/dit.": 1e-5,
    "f/pred": 1e-5,
    "f2/pred": 1e-5,
    "loss": 1e-5,
    "grad": 2e-5,
    # A rounding to bfloat16 may fall to the other side.
    "bf16/": 1e-4,
}
# What a file records and is no result.
GIVEN = ("meta", "pixels", "draw/", "w/", "lora/", "deep/pixels", "deep/posterior", "a/w/", "deep/w/")
_LAYERS = {"attn/proj": "self_attn.out_proj", "mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2"}


def reads(name: str) -> bool:
    return name.startswith("genhancer")


def bound(key: str) -> float:
    """The bound of a quantity."""
    return BOUNDS[max((prefix for prefix in BOUNDS if key.startswith(prefix)), key=len)]


def beside(path: Path, name: str) -> Path | None:
    """A file of the same folder, else of `family`."""
    return next((p for p in (path.with_name(name), FAMILY / name) if p.is_file()), None)


def case_name(path: Path) -> str:
    return re.sub(f"({'|'.join(PARTS)})$", "", path.stem)


class Case:
    """All arrays of a case, whichever of its files was given.

    Attributes:
      arrays: name -> array, without `meta`.
      meta: of all files.
      encoder: arrays of the VAE's encoder and its sizes.
    """

    def __init__(self, path: Path):
        self.name = case_name(path)
        found = [p for end in ("", *PARTS) if (p := beside(path, f"{self.name}{end}.npz"))]
        self.arrays, self.meta = {}, {}
        for file in found:
            z = np.load(file)
            self.arrays |= {k: z[k] for k in z.files if k != "meta"}
            self.meta |= json.loads(str(z["meta"]))
        if "pixels" not in self.arrays:
            raise ValueError(f"{self.name}.npz, which {path.name} belongs to, is missing: put it beside it")
        file = beside(path, "genhancer_vae.npz")
        if file is None:
            raise ValueError(f"{path.name} needs genhancer_vae.npz: put it beside it")
        self.encoder = encoder_of(np.load(file), self.name.removeprefix("genhancer_"))

    def has(self, key: str) -> bool:
        return any(k.startswith(key) for k in self.arrays)

    @property
    def hf_tensors(self) -> dict[str, np.ndarray]:
        return take(self.arrays, "w/model.")

    def spec(self) -> backbones.Spec:
        """The vision tower, from the arrays' shapes."""
        return hf_spec(self.hf_tensors, heads=HEADS)

    def config(self, *, adapted: bool):
        """The config of the objective that trains."""
        spec, dit = self.spec(), self.meta["dit"]
        c = config.default(spec, objective="genhancer")
        c.update(dtype="float32", frozen_dtype="float32")
        g = c.genhancer
        g.update(scale_factor=float(self.meta["scale_factor"]), guidance=float(self.meta["guidance"]))
        g.stage2 = "all" if adapted else "none"
        g.denoiser.update(
            in_channels=dit["in_channels"],
            vector_dim=self.meta["clip_dim"],
            text_dim=self.meta["t5_dim"],
            width=dit["hidden_size"],
            heads=dit["num_heads"],
            double_blocks=dit["depth"],
            single_blocks=dit["depth_single_blocks"],
            axes=tuple(dit["axes_dim"]),
        )
        g.vae.update(dataclasses.asdict(self.encoder[1]))
        if adapted:
            g.lora.update(rank=self.meta["rank"], alpha=float(self.meta["lora_alpha"]), dropout=0.0)
        return c

    def hf_layer(self, ours: str) -> list[str]:
        """The layers of transformers' model of which one of our tower's consists."""
        if m := re.fullmatch(r"blocks/(\d+)/(.*)", ours):
            inside = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
            inside = inside if m[2] == "attn/qkv" else [_LAYERS[m[2]]]
            return [f"model.vision_model.encoder.layers.{m[1]}.{layer}" for layer in inside]
        return ["model.visual_projection"]

    def weights(self, skeleton: partition.Skeleton, spec: backbones.Spec) -> dict[str, jax.Array]:
        """Name -> array of every parameter of the objective."""
        sources = {
            "vision": (Tensors(from_hf(self.hf_tensors, spec), []), clip.vision_table(spec)),
            "project_clip": (take(self.arrays, "w/project_clip."), PROJECTOR),
            "project_t5": (take(self.arrays, "w/project_t5."), PROJECTOR),
            "denoiser": (take(self.arrays, "w/dit."), DENOISER),
            "vae": (self.encoder[0], flux.VAE),
        }
        out = {}
        for name, (path, _) in skeleton.variables.items():
            part, *inner = path
            if "lora" in inner:
                *layer, _, leaf = inner
                which, layers = leaf.upper(), self.hf_layer("/".join(map(str, layer)))
                out[name] = jnp.stack([jnp.asarray(self.arrays[f"lora/{n}.lora_{which}"].T) for n in layers])
            else:
                tensors, table = sources[part]
                array = np.asarray(tensors[table.torch_name(tuple(inner))])
                out[name] = jnp.asarray(names.from_torch_layout(path, array))
        return out

    def module(self, **kw) -> tuple[partition.Skeleton, dict[str, jax.Array]]:
        """The objective of `config(**kw)`, apart, with the file's weights."""
        c = self.config(**kw)
        module = abstract(lambda rngs: genhancer.Objective(c, rngs=rngs))
        skeleton, _ = partition.disassemble(module)
        return skeleton, self.weights(skeleton, module.spec)

    def compute(self) -> dict[str, np.ndarray]:
        """Every recorded quantity, by its name in the files."""
        a = self.arrays
        pixels, freqs = jnp.asarray(a["pixels"]), a["f/freqs"]
        posterior = jnp.asarray(a["draw/posterior"])
        drawn = genhancer.GenHancerDraws(posterior, jnp.asarray(a["draw/t_normal"]), jnp.asarray(a["draw/noise"]))
        skeleton, weights = self.module(adapted=False)
        plain = skeleton.merge(weights)
        latents = jax.jit(lambda w: skeleton.merge(w).latents(pixels, posterior))(weights)

        def loss(trained, rest, skeleton):
            return skeleton.merge(trained, rest).forward(pixels, latents, drawn, freqs)

        def gradients(skeleton, arrays, trained):
            mine = {k: v for k, v in arrays.items() if trained(k)}
            rest = {k: v for k, v in arrays.items() if not trained(k)}
            return jax.jit(jax.value_and_grad(lambda t, r: loss(t, r, skeleton), has_aux=True))(mine, rest)

        (value, seen), grads = gradients(skeleton, weights, lambda n: not n.startswith(("vision/", "vae/")))
        out = {"latents": latents, "loss": value}
        out |= {f"f/{k}": v for k, v in seen.items()}
        out |= self.beside_the_forward(plain, seen, freqs)
        if self.has("grad1/"):
            out |= self.generator("grad1", skeleton, grads)
        if self.has("lora/"):
            out |= self.stage2(gradients)
        return {k: np.asarray(v) for k, v in out.items()}

    def beside_the_forward(self, module, seen, freqs) -> dict:
        """What the objective does not return: the tower's hidden states, ids, codes, the rotations."""
        pixels, grid = jnp.asarray(self.arrays["pixels"]), self.grid
        view = preprocess.normalise(pixels, module.spec.mean, module.spec.std)
        norm, caught = module.vision.norm, []

        def tap(x):
            caught.append((x, norm(x)))
            return caught[-1][1]

        module.vision.norm = tap
        module.vision.encode(view)
        before, after = caught[0]
        count = len(pixels)
        ids = np.broadcast_to(flow.token_positions(grid), (count, 1 + grid[0] * grid[1], 3))
        cos, sin = flow.rotations(module.flow_config, grid)
        turns = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
        t, guidance = seen["t"], jnp.full_like(seen["t"], module.options.guidance)
        return {
            "clip_pixels": view,
            "f/last_hidden": before,
            "f/pooled": after[:, 0],
            "f/txt_ids": ids[:, :1],
            "f/img_ids": ids[:, 1:],
            "f/dit.pe_embedder": np.broadcast_to(turns, (count, 1, *turns.shape)),
            "f/guidance": guidance,
            "f/freqs": flow.frequencies(),
            "f/timestep_code": flow.timestep_code(t, freqs),
            "f/guidance_code": flow.timestep_code(guidance, freqs),
            "bf16/timestep_code": flow.timestep_code(t.astype(jnp.bfloat16), freqs).astype(jnp.float32),
        }

    @property
    def grid(self) -> tuple[int, int]:
        _, h, w, _ = self.arrays["latents"].shape
        return h // 2, w // 2

    def generator(self, key: str, skeleton, grads) -> dict:
        """Gradients of projectors and denoiser under the file's names."""
        out = {}
        for name, gradient in grads.items():
            part, *inner = skeleton.variables[name][0]
            if part in ("project_clip", "project_t5", "denoiser"):
                table = DENOISER if part == "denoiser" else PROJECTOR
                prefix = "dit" if part == "denoiser" else part
                gradient = names.to_torch_layout(tuple(inner), np.asarray(gradient))
                out[f"{key}/{prefix}.{table.torch_name(tuple(inner))}"] = gradient
        return out

    def stage2(self, gradients) -> dict:
        """Forward pass with adapters, gradients, and the merged tower."""
        c = self.config(adapted=True)
        skeleton, weights = self.module(adapted=True)
        rows = genhancer.stages(c)[-1].trainable
        scales = partition.scales(rows, weights)
        (value, seen), grads = gradients(skeleton, weights, lambda n: scales[n] > 0)
        out = {"loss2": value} | {f"f2/{k}": seen[k] for k in ("embed", "vec", "txt", "pred")}
        everything = self.generator("grad2all", skeleton, grads)
        dit = [v for k, v in everything.items() if k.startswith("grad2all/dit.")]
        out |= {k: v for k, v in everything.items() if not k.startswith("grad2all/dit.")}
        out["grad2all/dit_norm"] = np.sqrt(sum(np.sum(np.square(v, dtype=np.float64)) for v in dit))
        for name, gradient in grads.items():
            if not name.startswith("vision/"):
                continue
            path = name.removeprefix("vision/").split("/")
            if path[-2] == "lora":
                for layer, part in zip(self.hf_layer("/".join(path[:-2])), gradient, strict=True):
                    out[f"grad2/{layer}.lora_{path[-1].upper()}"] = part.T
            else:
                layers = self.hf_layer("/".join(path[:-1]))
                for layer, part in zip(layers, jnp.split(gradient, len(layers)), strict=True):
                    out[f"grad2/{layer}.bias"] = part
        module = skeleton.merge(weights)
        tower = adapters.merge(module.vision)
        pixels = jnp.asarray(self.arrays["pixels"])
        view = preprocess.normalise(pixels, module.spec.mean, module.spec.std)
        out["f2/merged_embed"] = tower.encode(view).pooled
        width, first = module.spec.width, tower.blocks[0].attn.qkv
        out |= {"merged/q0.weight": first.kernel[...].T[:width], "merged/q0.bias": first.bias[...][:width]}
        return out

    def error(self, key: str, ours: np.ndarray, want: np.ndarray) -> float:
        """Relative L2 error; that of a key's bias, whose true gradient is zero, relative to the query's bias."""
        if re.fullmatch(r"grad2/.*\.k_proj\.bias", key):
            return relative(ours, 0 * want, self.arrays[key.replace("k_proj", "q_proj")])
        return relative(ours, want)


def encoder_of(z, case: str) -> tuple[Tensors, FluxVAEConfig]:
    """The arrays and the sizes of one encoder in genhancer_vae.npz."""
    meta = json.loads(str(z["meta"]))
    sizes = FluxVAEConfig(
        latent_channels=meta[case]["z"],
        block_out_channels=tuple(meta["ch"] * m for m in meta[case]["ch_mult"]),
        layers_per_block=meta[case]["num_res_blocks"],
        norm_num_groups=meta["groups"],
        scaling_factor=meta["scale_factor"],
        shift_factor=meta["shift_factor"],
    )
    return flux.with_matrices(Tensors(take(z, f"{case}/w/"), [])), sizes


def encoders(path: Path) -> list[tuple[str, float, float]]:
    """Errors of the encoders of genhancer_vae.npz that have results there."""
    z, rows = np.load(path), []
    for case in sorted(k.removesuffix("/pixels") for k in z.files if k.endswith("/pixels")):
        tensors, sizes = encoder_of(z, case)
        vae = filled(abstract(lambda rngs, sizes=sizes: VAE(sizes, rngs=rngs)), tensors, flux.VAE)
        view = 2 * jnp.asarray(z[f"{case}/pixels"]) - 1
        ours = {"moments": vae.moments(view), "latents": vae.encode(view, jnp.asarray(z[f"{case}/posterior"]))}
        for key, array in ours.items():
            want = z[f"{case}/{key}"]
            rows.append((f"{case}/{key}", relative(array, want), BOUNDS[""]))
    return rows


@functools.cache
def computed(folder: Path, name: str) -> tuple[Case, dict[str, np.ndarray]]:
    """Returns a case of a folder and what we compute of it, once for all its files."""
    case = Case(folder / f"{name}.npz")
    return case, case.compute()


def errors(golden: Path, sd: Path) -> list[tuple[str, float, float]]:
    with jax.default_matmul_precision("highest"):
        if golden.stem == "genhancer_vae":
            return encoders(golden)
        case, ours = computed(golden.parent, case_name(golden))
    recorded = [k for k in np.load(golden).files if not k.startswith(GIVEN)]
    if missing := [k for k in recorded if k not in ours]:
        raise ValueError(f"quantities that we do not compute: {missing}")
    return [(k, case.error(k, ours[k], case.arrays[k]), bound(k)) for k in recorded]
