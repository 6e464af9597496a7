"""What the readers of golden files share."""

import json
import re
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from helpers import filled

from diva_jax import config
from diva_jax.models import backbones
from diva_jax.weights import names

SD = Path(__file__).with_name("sd_tiny_7.npz")  # The U-Net and the VAE of the golden files; their config is beside it.
# The projectors of DCR and GenHancer under the names of the authors' code.
PROJECTOR = names.Table("projector", ((r"^norm\.", "0."), (r"^fc1\.", "1."), (r"^fc2\.", "3.")))


def take(arrays, prefix: str, new: str = "") -> dict[str, np.ndarray]:
    """Returns the arrays whose names begin with `prefix`, under their names with `new` in its place."""
    return {new + k[len(prefix) :]: np.asarray(arrays[k]) for k in arrays if k.startswith(prefix)}


def tower_spec(tensors, arch: str, **fields) -> backbones.Spec:
    """Returns the backbone of a tower's tensors under open_clip's names; `fields` are those that they do not tell."""
    siglip = dict(activation="gelu", norm_eps=1e-6, mean=backbones.HALF, std=backbones.HALF)
    about = siglip if arch == "siglip" else dict(activation="quick_gelu", norm_eps=1e-5)
    return backbones.Spec(**about | backbones.architecture(arch).shapes(tensors) | fields)


def from_hf(tensors, spec: backbones.Spec) -> dict[str, np.ndarray]:
    found = [r for r in backbones.architecture(spec.arch).TRANSFORMERS.recipes(spec) if all(n in tensors for n in r.hf)]
    return {n: np.asarray(t) for r in found for n, t in names._convert(r, tensors, False).items()}


def hf_spec(tensors, **fields) -> backbones.Spec:
    layers = {m[1] for k in tensors if (m := re.search(r"vision_model\.encoder\.layers\.(\d+)\.", k))}
    arch = "vit" if any("pre_layrnorm" in k for k in tensors) else "siglip"
    return tower_spec(from_hf(tensors, backbones.Spec(arch=arch, layers=len(layers))), arch, **fields)


# Our layers of a tower under the names of transformers' and peft's; there a fused projection is three.
_HF = ((r"^blocks\.", "vision_model.encoder.layers."), (r"^attn_pool\.proj\.", "vision_model.head.attention.out_proj."))
_HF += ((r"^attn_pool\.", "vision_model.head."), (r"^proj\.(matrix)?", "visual_projection."), (r"\.$", ".weight"))
_HF += ((r"\.attn\.proj\.", ".self_attn.out_proj."), (r"lora\.a$", "lora_A.weight"), (r"lora\.b$", "lora_B.weight"))
_HF_TOWER = names.Table("transformers' tower", _HF)


def hf_names(path) -> list[str]:
    """The tensors of transformers' and peft's tower of which a parameter of ours consists, by its path."""
    name = _HF_TOWER.torch_name(path)
    return [name.replace(".attn.qkv.", f".self_attn.{x}_proj.") for x in ("qkv" if ".attn.qkv." in name else "q")]


def hf_tensors(path, array) -> dict[str, np.ndarray]:
    """The values of a parameter of our tower under `hf_names`."""
    found, array = hf_names(path), np.asarray(array)
    return dict(zip(found, array.swapaxes(1, 2) if "lora" in path else np.split(array.T, len(found)), strict=True))


def diffusion_config() -> dict:
    """The default config's parts of Stable Diffusion, with the U-Net and the VAE of the golden files."""
    preset = config.default().diffusion.to_dict()
    return {k: preset[k] for k in ("text_encoder", "scheduler")} | json.loads(SD.with_suffix(".json").read_text())


def fill_generator(module, sd, text_context, unet=()) -> None:
    """Gives an objective the U-Net and VAE of a file, with further tensors of the U-Net, and its text condition."""
    module.unet = filled(module.unet, take(sd, "unet/") | dict(unet), names.UNET)
    module.vae = filled(module.vae, take(sd, "vae/"), names.VAE)
    module.text_context = nnx.Variable(jax.numpy.asarray(text_context))


def differentiate(skeleton, arrays, trains, loss):
    """((value, what it returns beside), gradients) of `loss(module)`, by the arrays whose name `trains`."""
    mine = {n: a for n, a in arrays.items() if trains(n)}
    rest = {n: a for n, a in arrays.items() if n not in mine}
    return jax.jit(jax.value_and_grad(lambda m, r: loss(skeleton.merge(m, r)), has_aux=True))(mine, rest)


def gradients(skeleton, grads, part: str, table) -> dict[str, np.ndarray]:
    """Returns the gradients of one part of an objective under its library's names, by `name -> gradient`."""
    variables = {n: v for n, v in skeleton.variables.items() if n.startswith(f"{part}/")}
    state = {path[1:]: var.replace(grads[name]) for name, (path, var) in variables.items()}
    return names.to_torch(nnx.from_flat_state(state), table)
