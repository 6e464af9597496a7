"""Golden files of DCR: both stages of the authors' code on one batch of three images, over tiny random modules.

A file holds inputs, weights under transformers' names, every random draw and the results, all switches faithful. The
U-Net and VAE are those of sd_tiny_7.npz.
"""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import filled
from reading import diffusion_config, fill_generator, from_hf, hf_spec, take

from diva_jax import config
from diva_jax.data import preprocess
from diva_jax.models import adapters, backbones
from diva_jax.models.diffusion.text_encoder import TextEncoder, TextEncoderConfig
from diva_jax.models.layers import Keys, abstract
from diva_jax.models.names import Table
from diva_jax.objectives import dcr
from diva_jax.objectives.dcr import contrast
from diva_jax.training import partition
from diva_jax.weights import names

PREFIX = "dcr_"
HEADS = 4  # Of both towers; the arrays do not tell.
_GIVEN = ("pixels", "plus/", "text_ids", "vae_noise", "timesteps", "noise", "w/", "stage2/lora/")
_PROJECTOR = Table("projector", ((r"^norm.", "0."), (r"^fc1.", "1."), (r"^fc2.", "3.")))
_HEAD = "vision_model.head."
# Layers of transformers' tower whose name is no rule's.
_LAYERS = {"visual_projection": "proj", f"{_HEAD}attention.out_proj": "attn_pool/proj"}
_LAYERS |= {f"{_HEAD}mlp.fc{i}": f"attn_pool/mlp/fc{i}" for i in (1, 2)}


def _layer(module: str) -> tuple[str, int | None]:
    """(our path of a layer of transformers' tower, the part of a fused projection that it is)."""
    if module in _LAYERS:
        return _LAYERS[module], None
    block, _, layer = module.removeprefix("vision_model.encoder.layers.").partition(".")
    attention = {f"self_attn.{letter}_proj": ("attn/qkv", i) for i, letter in enumerate("qkv")}
    path, part = (attention | {"self_attn.out_proj": ("attn/proj", None)}).get(layer, (layer.replace(".", "/"), None))
    return f"blocks/{block}/{path}", part


def _adapter(name: str) -> tuple[str, int]:
    """(our name of a matrix of peft's adapters, its number in a fused projection)."""
    module, matrix, _ = name.rsplit(".", 2)
    path, part = _layer(module)
    return f"vision/{path}/lora/{matrix[-1].lower()}", part or 0


def _piece(array, part: int | None):
    return array if part is None else jnp.split(array, 3, axis=-1)[part]


def settings(z, sd, exact: bool = False):
    activation = "gelu_tanh" if "w/vision_model.head.probe" in z.files else "quick_gelu"
    spec = hf_spec(take(z, "w/"), image_size=z["pixels"].shape[1], heads=HEADS, activation=activation)
    c = config.default(spec, diffusion_config(sd), "dcr")
    c.update(dtype="float32", frozen_dtype="float32", batch_size=len(z["pixels"]))
    c.dcr.update(group=len(z["pixels"]), tile=len(z["pixels"]) + 1, stage1_loss="faithful")
    c.dcr.lora.dropout = 0.0
    c.diffusion.text_tokens = z["text_ids"].shape[1]
    return c if exact else config.faithful(c)


def prompt(z) -> dict[str, np.ndarray]:
    """The text condition, with and without the mask of padding."""
    text = take(z, "w/text/")
    length, width = text["embeddings.position_embedding.weight"].shape
    layers = len({k.split(".")[2] for k in text if k.startswith("encoder.layers.")})
    vocabulary, mlp_dim = len(text["embeddings.token_embedding.weight"]), len(text["encoder.layers.0.mlp.fc1.weight"])
    sizes = TextEncoderConfig(vocabulary, length, width, layers, HEADS, mlp_dim)
    encoder = filled(abstract(lambda rngs: TextEncoder(sizes, rngs=rngs)), text, names.TEXT_ENCODER)
    ids = jnp.asarray(z["text_ids"])
    mask = jnp.arange(ids.shape[1])[None] <= jnp.argmax(ids, axis=1, keepdims=True)  # The end has the largest id.
    return {"text_context": encoder(ids, mask), "text_context_unmasked": encoder(ids)}


def objective(z, sd, text_context) -> dcr.Objective:
    module = dcr.Objective(settings(z, sd), rngs=Keys())
    plain = abstract(lambda rngs: backbones.build(module.spec, rngs=rngs))
    module.vision = filled(plain, from_hf(take(z, "w/"), module.spec), names.table("vision", module.spec))
    adapters.adapt(module.vision, module.options.lora, Keys())
    module.projector = filled(module.projector, take(z, "w/project_clip."), _PROJECTOR)
    fill_generator(module, sd, text_context)
    return module


def adapted(z, arrays: dict) -> dict:
    out = {}
    for name, value in take(z, "stage2/lora/").items():
        key, part = _adapter(name)
        if key in arrays:
            out.setdefault(key, {})[part] = value.T
        else:  # The layer whose own forward is never called: its adapter must be without effect.
            assert ".lora_A." in name or not value.any(), name
    stacked = {k: jnp.stack([v[i] for i in range(len(v))]) for k, v in out.items()}
    assert {k: v.shape for k, v in stacked.items()} == {k: a.shape for k, a in arrays.items() if "/lora/" in k}
    return arrays | stacked


def gradients(z, stage: str, grads: dict) -> np.ndarray:
    """Those that the file has, concatenated in its order."""
    projector = {_PROJECTOR.torch_name(tuple(n.split("/")[1:])): n for n in grads if n.startswith("projector/")}
    out = []
    for name in take(z, f"{stage}/grad/"):
        if name.startswith("project_clip."):
            value = grads[projector[name.removeprefix("project_clip.")]]
        elif ".lora_" in name:
            key, part = _adapter(name)
            value = grads[key][part]
        else:
            path, part = _layer(name.rsplit(".", 1)[0])
            value = _piece(grads[f"vision/{path}/bias"], part)
        out.append(np.asarray(value).T.ravel())
    return np.concatenate(out)


def merged(z, arrays: dict) -> dict[str, np.ndarray]:
    out = {}
    for key in take(z, "stage2/merged/"):
        path, part = _layer(key.rsplit(".", 1)[0])
        leaf = "matrix" if path == "proj" else "kernel"
        out[f"stage2/merged/{key}"] = np.asarray(_piece(arrays[f"{path}/{leaf}"], part)).T
    return out


def compute(z, sd) -> dict[str, np.ndarray]:
    """Every recorded quantity, by its name in the file; gradients of a stage concatenated, `stage1/grad`."""
    out, pixels = prompt(z), jnp.asarray(z["pixels"])
    module = objective(z, sd, out["text_context"])
    jitter = preprocess.Jitter(*(jnp.asarray(z[f"plus/{k}"]) for k in ("order", "jitter", "crop", "hflip", "vflip")))
    drawn = dcr.DcrDraws(*(jnp.asarray(z[k]) for k in ("timesteps", "noise", "vae_noise")), jitter, None)
    out |= dict(zip(("clip_view", "plus_view"), module.views(pixels, jitter), strict=True))
    exact = settings(z, sd, exact=True)
    out["exact/plus_view"] = abstract(lambda rngs: dcr.Objective(exact, rngs=rngs)).views(pixels, jitter)[1]
    out["vae_moments"] = jax.jit(module.vae.moments)(2 * pixels - 1)
    skeleton, arrays = partition.disassemble(module)
    scales_of = [partition.scales(s.trainable, arrays) for s in dcr.stages(settings(z, sd))]
    trains = {n for scales in scales_of for n, scale in scales.items() if scale}
    passes = jax.jit(jax.value_and_grad(lambda a, b: skeleton.merge(a, b).forward(pixels, drawn), has_aux=True))
    for stage, given, scales in zip(("stage1", "stage2"), (arrays, adapted(z, arrays)), scales_of, strict=True):
        trained = {n: a for n, a in given.items() if n in trains}
        (value, seen), grads = passes(trained, {n: a for n, a in given.items() if n not in trains})
        found, active = seen["contrast"], [n for n, scale in scales.items() if scale]
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(grads[n])) for n in active))
        rest = dict(loss=value, grad_norm=norm, pred=seen["predicted"][:, :-1], pred_plus=seen["predicted"][:, -1])
        rest |= dict(logits_all=found.others, logits_plus=found.plus, logits_target=found.target, losses=found.losses)
        rest |= {k: seen[k] for k in ("embedding", "context", "context_plus")}
        out |= {f"{stage}/{k}": v for k, v in rest.items()}
        out[f"{stage}/grad"] = gradients(z, stage, grads)
        if sum(given[n].size for n in active) != out[f"{stage}/grad"].size:
            raise ValueError(f"{stage} trains other parameters than the file has gradients of")
        noise = contrast(seen["predicted"], drawn.noise, jnp.arange(len(pixels)), module.options.temperature)
        out[f"exact/{stage}/loss_epsilon"] = jnp.mean(noise.losses)
        if stage == "stage2":
            out |= merged(z, partition.disassemble(skeleton.merge(given).towers()["vision"])[1])
    return out | dict(latents=seen["latents"], noisy_latents=seen["noisy"], velocity=seen["goal"])


def compare(path, z, sd):
    recorded = {k: z[k] for k in z.files if not k.startswith(_GIVEN) and "/grad/" not in k}
    for stage in ("stage1", "stage2"):
        recorded[f"{stage}/grad"] = np.concatenate([v.ravel() for v in take(z, f"{stage}/grad/").values()])
    return recorded, compute(z, sd), {}
