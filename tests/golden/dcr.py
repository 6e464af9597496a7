"""Golden files of DCR: both stages of the authors' code on one batch of three images, over tiny random modules.

A file holds inputs, weights under transformers' names, every random draw and the results, all switches faithful. The
U-Net and VAE are those of sd_tiny_7.npz.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from diva import diffusion_config
from flax import nnx
from helpers import filled
from reading import from_hf, hf_spec, rows, take

from diva_jax import config
from diva_jax.data import preprocess
from diva_jax.models import adapters, backbones
from diva_jax.models.diffusion.unet import TextEncoder, TextEncoderConfig
from diva_jax.models.layers import Keys, abstract
from diva_jax.models.names import Table
from diva_jax.objectives import dcr
from diva_jax.objectives.dcr import contrast
from diva_jax.training import partition
from diva_jax.weights import clip, names

# Relative L2 error, by the last component of a quantity's name, or by a component that is in it.
BOUNDS = {
    "clip_view": 1e-6,
    "plus_view": 1e-6,
    "text_context": 2e-6,
    "text_context_unmasked": 2e-6,
    "vae_moments": 2e-6,
    "latents": 2e-6,
    "noisy_latents": 2e-6,
    "velocity": 2e-6,
    "embedding": 2e-6,
    "context": 2e-6,
    "context_plus": 2e-6,
    "pred": 5e-6,
    "pred_plus": 5e-6,
    "logits_all": 5e-6,
    "logits_plus": 5e-6,
    "logits_target": 5e-6,
    "losses": 5e-6,
    "loss": 5e-6,
    "loss_epsilon": 5e-6,
    "grad_norm": 1e-5,
    "grad": 1e-5,
    "merged": 1e-6,
}
HEADS = 4  # Of both towers; the arrays do not tell.
_GIVEN = ("pixels", "plus/", "text_ids", "vae_noise", "timesteps", "noise", "w/", "stage2/lora/")


def vision_spec(z) -> backbones.Spec:
    """The backbone of a golden file."""
    activation = "gelu_tanh" if "w/vision_model.head.probe" in z.files else "quick_gelu"
    return hf_spec(take(z, "w/"), image_size=z["pixels"].shape[1], heads=HEADS, activation=activation)


def _layer(spec: backbones.Spec, module: str) -> tuple[str, int | None]:
    """(our path of a layer of transformers' tower, the part of a fused projection that it is)."""
    fixed = {
        "visual_projection": "proj",
        "vision_model.head.attention.out_proj": "attn_pool/proj",
        "vision_model.head.mlp.fc1": "attn_pool/mlp/fc1",
        "vision_model.head.mlp.fc2": "attn_pool/mlp/fc2",
    }
    if module in fixed:
        return fixed[module], None
    block, _, layer = module.removeprefix("vision_model.encoder.layers.").partition(".")
    attention = {f"self_attn.{letter}_proj": ("attn/qkv", i) for i, letter in enumerate("qkv")}
    path, part = (attention | {"self_attn.out_proj": ("attn/proj", None)}).get(layer, (layer.replace(".", "/"), None))
    return f"blocks/{block}/{path}", part


def _piece(array, part: int | None):
    """The part of a fused projection's output, the last axis."""
    return array if part is None else jnp.split(array, 3, axis=-1)[part]


class Reader:
    """A golden file's objective, and its quantities."""

    def __init__(self, z, sd, exact: bool = False):
        self.z, self.sd, self.spec = z, sd, vision_spec(z)
        d = diffusion_config(sd)
        text = take(z, "w/text/")
        width = text["final_layer_norm.weight"].shape[0]
        self.text = TextEncoderConfig(
            vocab_size=text["embeddings.token_embedding.weight"].shape[0],
            context_length=text["embeddings.position_embedding.weight"].shape[0],
            width=width,
            layers=len({k.split(".")[2] for k in text if k.startswith("encoder.layers.")}),
            heads=HEADS,
            mlp_dim=text["encoder.layers.0.mlp.fc1.weight"].shape[0],
        )
        c = config.default(self.spec, d, "dcr")
        c.update(dtype="float32", frozen_dtype="float32", batch_size=len(z["pixels"]))
        c.dcr.update(group=len(z["pixels"]), tile=len(z["pixels"]) + 1, stage1_loss="faithful")
        c.dcr.lora.dropout = 0.0
        c.diffusion.text_tokens = z["text_ids"].shape[1]
        self.config = c if exact else config.faithful(c)

    def prompt(self) -> dict[str, np.ndarray]:
        """The text condition, with and without the mask of padding."""
        encoder = filled(
            abstract(lambda rngs: TextEncoder(self.text, rngs=rngs)), take(self.z, "w/text/"), names.TEXT_ENCODER
        )
        ids = jnp.asarray(self.z["text_ids"])
        mask = jnp.arange(ids.shape[1])[None] <= jnp.argmax(ids, axis=1, keepdims=True)  # The end has the largest id.
        return {"text_context": encoder(ids, mask), "text_context_unmasked": encoder(ids)}

    def objective(self, text_context) -> dcr.Objective:
        """With the file's weights; adapters as they are initialised."""
        module = dcr.Objective(self.config, rngs=Keys())
        plain = abstract(lambda rngs: backbones.build(self.spec, rngs=rngs))
        tensors = from_hf(take(self.z, "w/"), self.spec)
        module.vision = filled(plain, tensors, clip.vision_table(self.spec))
        adapters.adapt(module.vision, module.options.lora, Keys())
        leaves = (("norm.", "0."), ("fc1.", "1."), ("fc2.", "3."))
        table = Table("projector", tuple((f"^{ours}", theirs) for ours, theirs in leaves))
        module.projector = filled(module.projector, take(self.z, "w/project_clip."), table)
        self.projector = table
        module.unet = filled(module.unet, take(self.sd, "unet/"), names.UNET)
        module.vae = filled(module.vae, take(self.sd, "vae/"), names.VAE)
        module.text_context = nnx.Variable(jnp.asarray(text_context))
        return module

    def drawn(self) -> dcr.DcrDraws:
        z = self.z
        plus = preprocess.Jitter(*(jnp.asarray(z[f"plus/{k}"]) for k in ("order", "jitter", "crop", "hflip", "vflip")))
        t, noise, posterior = (jnp.asarray(z[k]) for k in ("timesteps", "noise", "vae_noise"))
        return dcr.DcrDraws(t, noise, posterior, plus, None)

    def adapted(self, arrays: dict) -> dict:
        """The parameters with stage 2's adapters."""
        out = {}
        for name, value in take(self.z, "stage2/lora/").items():
            module, matrix, _ = name.rsplit(".", 2)
            path, part = _layer(self.spec, module)
            key = f"vision/{path}/lora/{matrix[-1].lower()}"
            if key in arrays:
                out.setdefault(key, {})[part or 0] = value.T
            else:  # The layer whose own forward is never called: its adapter must be without effect.
                assert matrix == "lora_A" or not value.any(), name
        stacked = {k: jnp.stack([v[i] for i in range(len(v))]) for k, v in out.items()}
        assert {k: v.shape for k, v in stacked.items()} == {k: a.shape for k, a in arrays.items() if "/lora/" in k}
        return arrays | stacked

    def gradients(self, stage: str, grads: dict) -> np.ndarray:
        """Those that the file has, concatenated in its order."""
        out = []
        for name in take(self.z, f"{stage}/grad/"):
            if name.startswith("project_clip."):
                ours = {self.projector.torch_name(tuple(n.split("/")[1:])): n for n in grads if n[0] == "p"}
                value = grads[ours[name.removeprefix("project_clip.")]]
            elif ".lora_" in name:
                module, matrix, _ = name.rsplit(".", 2)
                path, part = _layer(self.spec, module)
                value = grads[f"vision/{path}/lora/{matrix[-1].lower()}"][part or 0]
            else:
                path, part = _layer(self.spec, name.rsplit(".", 1)[0])
                value = _piece(grads[f"vision/{path}/bias"], part)
            out.append(np.asarray(value).T.ravel())
        return np.concatenate(out)

    def merged(self, arrays: dict) -> dict[str, np.ndarray]:
        """The merged weights that the file has."""
        out = {}
        for key in (k for k in self.z.files if k.startswith("stage2/merged/")):
            path, part = _layer(self.spec, key.removeprefix("stage2/merged/").rsplit(".", 1)[0])
            leaf = "matrix" if path == "proj" else "kernel"
            out[key] = np.asarray(_piece(arrays[f"{path}/{leaf}"], part)).T
        return out


def compute(z, sd) -> dict[str, np.ndarray]:
    """Every recorded quantity, by its name in the file; gradients of a stage concatenated, `stage1/grad`."""
    reader = Reader(z, sd)
    out = reader.prompt()
    module, drawn, pixels = reader.objective(out["text_context"]), reader.drawn(), jnp.asarray(z["pixels"])
    out |= dict(zip(("clip_view", "plus_view"), module.views(pixels, drawn.jitter), strict=True))
    exact = Reader(z, sd, exact=True)
    other = abstract(lambda rngs: dcr.Objective(exact.config, rngs=rngs))
    out["exact/plus_view"] = other.views(pixels, drawn.jitter)[1]
    out["vae_moments"] = jax.jit(module.vae.moments)(2 * pixels - 1)
    skeleton, arrays = partition.disassemble(module)
    stages = dcr.stages(reader.config)
    scales_of = [partition.scales(s.trainable, arrays) for s in stages]
    trains = {n for scales in scales_of for n, scale in scales.items() if scale}

    @jax.jit
    def passes(trained, frozen):
        return jax.value_and_grad(lambda trained: skeleton.merge(trained, frozen).forward(pixels, drawn), has_aux=True)(
            trained
        )

    for stage, given, scales in zip(("stage1", "stage2"), (arrays, reader.adapted(arrays)), scales_of, strict=True):
        trained = {n: a for n, a in given.items() if n in trains}
        (value, seen), grads = passes(trained, {n: a for n, a in given.items() if n not in trains})
        found = seen["contrast"]
        active = [grads[n] for n, scale in scales.items() if scale]
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in active))
        rest = dict(loss=value, grad_norm=norm, pred=seen["predicted"][:, :-1], pred_plus=seen["predicted"][:, -1])
        rest |= dict(logits_all=found.others, logits_plus=found.plus, logits_target=found.target, losses=found.losses)
        rest |= {k: seen[k] for k in ("embedding", "context", "context_plus")}
        out |= {f"{stage}/{k}": v for k, v in rest.items()}
        out[f"{stage}/grad"] = reader.gradients(stage, grads)
        recorded = {n for n, scale in scales.items() if scale}
        if sum(given[n].size for n in recorded) != out[f"{stage}/grad"].size:
            raise ValueError(f"{stage} trains other parameters than the file has gradients of")
        rows_ = jnp.arange(len(pixels))
        noise = contrast(seen["predicted"], drawn.noise, rows_, module.options.temperature)
        out[f"exact/{stage}/loss_epsilon"] = jnp.mean(noise.losses)
        if stage == "stage2":
            out |= reader.merged(partition.disassemble(skeleton.merge(given).towers()["vision"])[1])
    out |= dict(latents=seen["latents"], noisy_latents=seen["noisy"], velocity=seen["goal"])
    return {k: np.asarray(v) for k, v in out.items()}


def reads(name: str) -> bool:
    return name.startswith("dcr_")


def _bound(key: str) -> float:
    return BOUNDS["merged" if "/merged/" in key else key.rsplit("/", 1)[-1]]


def errors(golden: Path, sd: Path) -> list[tuple[str, float, float]]:
    z, states = np.load(golden), np.load(sd)
    with jax.default_matmul_precision("highest"):
        ours = compute(z, states)
    recorded = {k: z[k] for k in z.files if not k.startswith(_GIVEN) and "/grad/" not in k}
    for stage in ("stage1", "stage2"):
        recorded[f"{stage}/grad"] = np.concatenate([v.ravel() for v in take(z, f"{stage}/grad/").values()])
    return rows(recorded, ours, _bound)
