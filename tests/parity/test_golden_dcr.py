"""What DCR's golden file does not pin: transformers' SigLIP tower with adapters, and the mask of padding."""

import dcr as reader
import jax
import jax.numpy as jnp
import numpy as np
import torch
from helpers import close, filled, randomise, relative_error, tensors
from places import TESTS
from transformers import CLIPTextConfig, CLIPTextModel, SiglipVisionConfig, SiglipVisionModel

from diva_jax.models.diffusion.text_encoder import TextEncoder, TextEncoderConfig
from diva_jax.models.layers import abstract
from diva_jax.training import partition
from diva_jax.weights import diffusers

HERE = TESTS / "golden"
SD = HERE / "sd_tiny_7.npz"


class Recorded(dict):
    """A golden file in memory."""

    @property
    def files(self):
        return list(self)


def whole_names(theirs) -> dict:
    """A vision tower's tensors, with the names that they have in the whole model."""
    return {f"vision_model.{k.removeprefix('vision_model.')}": v for k, v in tensors(theirs).items()}


def siglip_file(theirs) -> Recorded:
    """A file of a SigLIP tower: the arrays that the reader needs to build the objective."""
    rng, z = np.random.default_rng(0), Recorded(np.load(HERE / "family" / "dcr_OpenAICLIP_21.npz"))
    width = theirs.config.hidden_size
    for key in [
        k for k in z if k.startswith(("w/vis", "w/project_clip.0", "w/project_clip.1", "stage2/lora", "stage2/merged"))
    ]:
        del z[key]
    z |= {f"w/{k}": v for k, v in whole_names(theirs).items()}
    z |= {"w/project_clip.0.weight": np.ones(width, np.float32), "w/project_clip.0.bias": np.zeros(width, np.float32)}
    z["w/project_clip.1.weight"] = rng.normal(size=(48, width)).astype(np.float32)
    z["w/project_clip.1.bias"] = np.zeros(48, np.float32)
    z["pixels"] = rng.uniform(size=(3, 64, 64, 3)).astype(np.float32)
    z["stage1/embedding"] = np.zeros((3, width), np.float32)
    head = "vision_model.head."
    for name, w in whole_names(theirs).items():
        if w.ndim == 2 and any(part in name for part in ("_proj.weight", ".fc1.", ".fc2.")):
            module, inert = name.removesuffix(".weight"), name.startswith(f"{head}attention")
            z[f"stage2/lora/{module}.lora_A.weight"] = 0.2 * rng.normal(size=(16, w.shape[1])).astype(np.float32)
            b = 0.1 * rng.normal(size=(w.shape[0], 16)).astype(np.float32)
            z[f"stage2/lora/{module}.lora_B.weight"] = b * (not inert)
    return z


def test_siglip_tower_with_adapters_and_merged():
    """64 px, patch 14: 8 pixels are dropped. The pooling's output projection has an adapter without effect."""
    sizes = dict(hidden_size=48, intermediate_size=144, num_hidden_layers=2, num_attention_heads=4)
    theirs = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=64, patch_size=14))
    theirs = randomise(theirs)
    z = siglip_file(theirs)
    r = reader.Reader(z, np.load(SD))
    module = r.objective(z["text_context"])
    skeleton, arrays = partition.disassemble(module)
    view = np.random.default_rng(1).normal(size=(3, 64, 64, 3)).astype(np.float32)

    @jax.jit
    def embed(arrays):
        return skeleton.merge(arrays).embed(jnp.asarray(view), None)

    def want():
        with torch.no_grad():
            return theirs(torch.from_numpy(view.transpose(0, 3, 1, 2))).pooler_output

    close(embed(arrays), want(), 2e-6)
    adapted = r.adapted(arrays)
    changed = {}
    for key in (k for k in z if k.startswith("stage2/lora/") and ".lora_A." in k):
        weight = key.removeprefix("stage2/lora/").replace(".lora_A.weight", ".weight")
        changed[weight] = z[key.replace("lora_A", "lora_B")] @ z[key]
    for name, parameter in theirs.named_parameters():
        if (update := changed.get(f"vision_model.{name.removeprefix('vision_model.')}")) is not None:
            parameter.data += torch.from_numpy(update)
    close(embed(adapted), want(), 2e-6)
    merged = skeleton.merge(adapted).towers()["vision"]
    for k, v in changed.items():
        z[f"stage2/merged/{k}"] = v
    want_merged = whole_names(theirs)
    for key, array in r.merged(partition.disassemble(merged)[1]).items():
        name = key.removeprefix("stage2/merged/")
        close(array, want_merged[name], 1e-6, name)


def test_padding_is_masked_as_in_transformers():
    sizes = dict(vocab_size=50, hidden_size=40, intermediate_size=72, num_hidden_layers=2, num_attention_heads=5)
    options = sizes | dict(max_position_embeddings=9, hidden_act="gelu", eos_token_id=2)
    theirs = randomise(CLIPTextModel(CLIPTextConfig(**options)))
    config = TextEncoderConfig.from_dict(options)
    ours = abstract(lambda rngs: TextEncoder(config, rngs=rngs))
    ours = filled(ours, tensors(theirs), diffusers.TEXT_ENCODER)
    ids = np.array([[48, 49, 0, 0, 0, 0, 0, 0, 0], [48, 3, 7, 49, 0, 0, 0, 0, 0]])
    mask = np.arange(9)[None] <= np.array([[1], [3]])
    with torch.no_grad():
        want = theirs(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask.astype(np.int64)))[0]
    close(ours(jnp.asarray(ids), jnp.asarray(mask)), want, 2e-6)
    assert relative_error(ours(jnp.asarray(ids)), want) > 1e-2
