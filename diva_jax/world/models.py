"""The world's models: their sizes, their configs, and new ones with random weights in the usual folders."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax import nnx

from diva_jax import config
from diva_jax.models.backbones import HALF, Spec, TextSpec
from diva_jax.models.diffusion import presets
from diva_jax.models.layers import Keys
from diva_jax.weights import formats, names, parts
from diva_jax.world import captions, drawing, patch_code, scenes, vocabulary

WEIGHTS = Path(__file__).parent / "weights"  # What `pretrain` made, kept in the repository.
# Folders there: two in open_clip's layout, two in diffusers', and one with a projection of DIVA. The teacher is a CLIP
# that learned from rich captions; the projection brings the embedding of the CLIP to the generator's condition.
CLIP, TEACHER, GENERATOR, UNCLIP, PROJECTION = "clip", "teacher", "generator", "unclip", "projection"
PROJECTION_FILE = "visual_proj.safetensors"
TOKENS = 16  # Number of tokens per text.
_VOCABULARY = len(vocabulary.tokens(captions.WORDS))
# Of the patch code. An object lies in one column or row of the 2 x 2 latents, so that its place is easy to learn.
_PATCH, _CHANNELS = 8, 64
_WIDTH = 64  # Channels of the U-Net and of its text encoder.
_BASIS_SCENES = 2048  # Number of scenes from which the patterns of the patch code are made.

SPEC = Spec(
    open_clip_name="world",
    source=str(WEIGHTS / CLIP),
    image_size=drawing.SIDE,
    patch_size=4,
    width=64,
    layers=3,
    heads=2,
    mlp_dim=256,
    embed_dim=64,
    mean=HALF,
    std=HALF,
    select="none",
    add_text="mean",
    text=TextSpec(context_length=TOKENS, vocab_size=_VOCABULARY, width=64, heads=2, layers=2, mlp_dim=256),
)
_UNET = dict(
    sample_size=drawing.SIDE // _PATCH,
    in_channels=_CHANNELS,
    out_channels=_CHANNELS,
    block_out_channels=[_WIDTH],
    layers_per_block=1,
    attention_head_dim=[2],
    cross_attention_dim=_WIDTH,
    use_linear_projection=True,
    norm_num_groups=8,
    down_block_types=["CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D"],
)
# The velocity and not the noise: in terms of the noise, the steps of high noise, where the caption matters most, have
# next to no weight in the loss.
_SCHEDULER = dict(presets.preset("sd21_base")["scheduler"], prediction_type="v_prediction")
DIFFUSION = dict(
    unet=_UNET,
    vae=dict(_class_name=patch_code.PATH, patch_size=_PATCH, latent_channels=_CHANNELS, scaling_factor=1.9),
    text_encoder=dict(
        vocab_size=_VOCABULARY,
        hidden_size=_WIDTH,
        intermediate_size=4 * _WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    ),
    scheduler=_SCHEDULER,
)
# The generator of un2CLIP is conditioned on the embedding of `SPEC` and the code of a noise level.
UNCLIP_DIFFUSION = DIFFUSION | dict(
    unet=_UNET | dict(class_embed_type="projection", projection_class_embeddings_input_dim=2 * SPEC.embed_dim),
)
_FILES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
_KINDS = {
    "unet": {"_class_name": "UNet2DConditionModel"},
    "vae": {},
    "text_encoder": {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"]},
    "scheduler": {"_class_name": "DDIMScheduler", "clip_sample": False},
}
TABLES = {"unet": names.UNET, "text_encoder": names.TEXT_ENCODER}


def base_config(objective: str, diffusion: Mapping | None = None):
    """The config of any objective in the world: float32, the world's models, images without crops."""
    c = config.default(SPEC, dict(diffusion or DIFFUSION), objective)
    c.dtype = c.frozen_dtype = "float32"
    c.data.image_size = drawing.SIDE
    c.data.crop.scale = c.data.crop.ratio = (1.0, 1.0)
    c.data.threads, c.data.prefetch = 1, 2
    c.log.every, c.log.tensorboard = 20, False
    if "genhancer" in c:
        c.genhancer.denoiser.update(
            in_channels=4 * _CHANNELS, vector_dim=96, text_dim=96, width=96, heads=3, axes=(8, 12, 12)
        )
        c.genhancer.denoiser.double_blocks, c.genhancer.denoiser.single_blocks = 1, 2
        c.genhancer.vae.update(source=str(WEIGHTS / GENERATOR), code=patch_code.PATH, latent_channels=_CHANNELS)
        c.genhancer.vae.scaling_factor = DIFFUSION["vae"]["scaling_factor"]
    c.teacher.update(dataclasses.asdict(dataclasses.replace(SPEC, source=str(WEIGHTS / TEACHER))))
    if "kuea" in c:
        c.kuea.teacher.update(c.teacher)
        c.kuea.teacher_crop_from = drawing.SIDE
    if "salm" in c:
        c.salm.layer = 1
        c.salm.adapter.update(layers=2, width=96, heads=3)
    if "diffusion" in c:
        c.diffusion.prompt, c.diffusion.text_tokens = captions.PREFIX, TOKENS
        c.diffusion.source = str(WEIGHTS / (GENERATOR if c.diffusion.unet.get("class_embed_type") is None else UNCLIP))
    return c


def write_new_clip(folder: Path, seed: int = 0) -> None:
    """Writes both towers with random weights and the tokenizer, in open_clip's layout."""
    names.write_random_clip(folder, SPEC, seed)
    vocabulary.write(folder, captions.WORDS, TOKENS)


def basis(seed: int = 0) -> tuple[np.ndarray, float]:
    """(patterns of the patch code [192, 64], the scaling factor that gives the latents a variance of one)."""
    images = drawing.draw(scenes.sample(np.random.default_rng(seed), _BASIS_SCENES)).astype(np.float32)
    images = images / 127.5 - 1
    patterns = patch_code.principal(images, _PATCH, _CHANNELS)
    codes = patch_code.patches(images, _PATCH) @ patterns
    return patterns, float(np.round(1 / np.sqrt(np.mean(codes**2)), 3))


def write_part(folder: Path, part: str, options: Mapping, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes `folder/part`: config.json and weights, as diffusers and transformers do."""
    (folder / part).mkdir(parents=True, exist_ok=True)
    formats.write_safetensors(folder / part / f"{_FILES[part]}.safetensors", tensors)
    formats.write_json(folder / part / "config.json", _KINDS[part] | dict(options))


def write_new_diffusion(folder: Path, diffusion: Mapping, seed: int = 0) -> None:
    """Writes a generator with random weights and the world's patch code, in diffusers' layout."""
    d = presets.Diffusion.from_dict(dict(source="", prompt="", text_tokens=TOKENS, **diffusion))
    rngs = Keys(seed)
    for of in (d.unet, d.text_encoder):
        part, model, table, _ = parts.STABLE_DIFFUSION[type(of)]
        write_part(folder, part, diffusion[part], names.to_torch(nnx.state(model(of, rngs=rngs)), table))
    write_part(folder, "vae", diffusion["vae"], {"basis": basis()[0].astype(np.float32)})
    (folder / "scheduler").mkdir(exist_ok=True)
    formats.write_json(
        folder / "scheduler" / "scheduler_config.json", _KINDS["scheduler"] | dict(diffusion["scheduler"])
    )
    vocabulary.write(folder / "tokenizer", captions.WORDS, TOKENS)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": [patch_code.__name__, "PatchCode"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))


def rounded(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same tensors in the type in which they are kept, float16."""
    return {name: np.asarray(a).astype(np.float16) for name, a in tensors.items()}
