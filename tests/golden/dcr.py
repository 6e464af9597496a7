"""Golden files of DCR: both stages of the authors' code on one batch of three images, over tiny random modules.

A file holds inputs, weights under transformers' names, every random draw and the results, all switches faithful. The
U-Net and VAE are those of sd_tiny_7.npz.
"""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import filled
from reading import PROJECTOR, diffusion_config, fill_generator, from_hf, gradients, hf_names, hf_spec, hf_tensors, take

from diva_jax import config
from diva_jax.data import preprocess
from diva_jax.models import adapters, backbones
from diva_jax.models.diffusion.text_encoder import TextEncoder, TextEncoderConfig
from diva_jax.models.layers import Keys, abstract
from diva_jax.objectives import dcr
from diva_jax.objectives.dcr import contrast
from diva_jax.training import partition
from diva_jax.weights import names

PREFIX = "dcr_"
HEADS = 4  # Of both towers; the arrays do not tell.
_GIVEN = ("pixels", "plus/", "text_ids", "vae_noise", "timesteps", "noise", "w/", "stage2/lora/")


def settings(z, exact: bool = False):
    activation = "gelu_tanh" if "w/vision_model.head.probe" in z.files else "quick_gelu"
    spec = hf_spec(take(z, "w/"), image_size=z["pixels"].shape[1], heads=HEADS, activation=activation)
    c = config.default(spec, diffusion_config(), "dcr")
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
    module = abstract(lambda rngs: dcr.Objective(settings(z), rngs=rngs))
    plain = abstract(lambda rngs: backbones.build(module.spec, rngs=rngs))
    module.vision = filled(plain, from_hf(take(z, "w/"), module.spec), names.table("vision", module.spec))
    adapters.adapt(module.vision, module.options.lora, Keys())
    module.projector = filled(module.projector, take(z, "w/project_clip."), PROJECTOR)
    fill_generator(module, sd, text_context)
    return module


def adapted(z, arrays: dict) -> dict:
    given, out = take(z, "stage2/lora/"), {}
    for name in (n for n in arrays if "/lora/" in n):
        out[name] = jnp.stack([given.pop(n).T for n in hf_names(name.split("/")[1:])])
    # The layer whose own forward is never called: its adapter must be without effect.
    assert not [n for n, a in given.items() if ".lora_B." in n and a.any()]
    return arrays | out


def tower_tensors(arrays: dict) -> dict[str, np.ndarray]:
    return {n: t for name, a in arrays.items() for n, t in hf_tensors(name.split("/"), a).items()}


def compute(z, sd) -> dict[str, np.ndarray]:
    """Every recorded quantity, by its name in the file; gradients of a stage concatenated, `stage1/grad`."""
    out, pixels = prompt(z), jnp.asarray(z["pixels"])
    module = objective(z, sd, out["text_context"])
    jitter = preprocess.Jitter(*(jnp.asarray(z[f"plus/{k}"]) for k in ("order", "jitter", "crop", "hflip", "vflip")))
    drawn = dcr.DcrDraws(*(jnp.asarray(z[k]) for k in ("timesteps", "noise", "vae_noise")), jitter, None)
    out |= dict(zip(("clip_view", "plus_view"), module.views(pixels, jitter), strict=True))
    exact = settings(z, exact=True)
    out["exact/plus_view"] = abstract(lambda rngs: dcr.Objective(exact, rngs=rngs)).views(pixels, jitter)[1]
    out["vae_moments"] = jax.jit(module.vae.moments)(2 * pixels - 1)
    skeleton, arrays = partition.disassemble(module)
    scales_of = [partition.scales(s.trainable, arrays) for s in dcr.stages(settings(z))]
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
        ours = tower_tensors({n.removeprefix("vision/"): g for n, g in grads.items() if n.startswith("vision/")})
        ours |= {f"project_clip.{n}": g for n, g in gradients(skeleton, grads, "projector", PROJECTOR).items()}
        out[f"{stage}/grad"] = np.concatenate([ours[n].ravel() for n in take(z, f"{stage}/grad/")])
        if sum(given[n].size for n in active) != out[f"{stage}/grad"].size:
            raise ValueError(f"{stage} trains other parameters than the file has gradients of")
        noise = contrast(seen["predicted"], drawn.noise, jnp.arange(len(pixels)), module.options.temperature)
        out[f"exact/{stage}/loss_epsilon"] = jnp.mean(noise.losses)
        if stage == "stage2":
            merged = tower_tensors(partition.disassemble(skeleton.merge(given).towers()["vision"])[1])
            out |= {f"stage2/merged/{n}": merged[n] for n in take(z, "stage2/merged/")}
    return out | dict(latents=seen["latents"], noisy_latents=seen["noisy"], velocity=seen["goal"])


def compare(path, z, sd):
    recorded = {k: z[k] for k in z.files if not k.startswith(_GIVEN) and "/grad/" not in k}
    for stage in ("stage1", "stage2"):
        recorded[f"{stage}/grad"] = np.concatenate([v.ravel() for v in take(z, f"{stage}/grad/").values()])
    return recorded, compute(z, sd), {}
