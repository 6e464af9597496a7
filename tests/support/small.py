"""Whole objectives, small enough to compile in seconds: two levels of U-Net and VAE, two backbone blocks."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from specs import DINOV2_REG, TRAINED as SPEC

from diva_jax import config
from diva_jax.models.backbones import HALF, TextSpec
from diva_jax.models.diffusion import presets
from diva_jax.training import partition
from diva_jax.training.step import Program

# With images whose latents have side 14, then 7.
SPEC_28 = dataclasses.replace(SPEC, image_size=28)
SIGLIP_28 = dataclasses.replace(
    SPEC_28, arch="siglip", embed_dim=24, activation="gelu", norm_eps=1e-6, mean=HALF, std=HALF, resize_mode="squash"
)
_DENOISER = dict(in_channels=12, vector_dim=20, text_dim=28, width=36, heads=3, axes=(4, 2, 6), mlp_ratio=2.0)
_DENOISER |= dict(double_blocks=1, single_blocks=1)
_FLUX_VAE = dict(latent_channels=3, block_out_channels=(8, 12), layers_per_block=1, norm_num_groups=4)


def diffusion() -> dict:
    sd = presets.preset("tiny")
    sd["unet"] |= dict(
        block_out_channels=(8, 16),
        attention_head_dim=(2, 4),
        cross_attention_dim=24,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    sd["vae"] |= dict(block_out_channels=(8, 12), down_block_types=("DownEncoderBlock2D",) * 2)
    sd["text_encoder"] |= dict(hidden_size=24, intermediate_size=40)
    return sd


def unclip_diffusion() -> dict:
    """`diffusion` with a class embedding, as un²CLIP's."""
    sd = diffusion()
    sd["unet"] |= dict(class_embed_type="projection", projection_class_embeddings_input_dim=2 * SPEC.embed_dim)
    sd["scheduler"] = sd["scheduler"] | dict(prediction_type="v_prediction")
    return sd


def with_fields(c, fields):
    """Sets fields of a config by dotted name, `__` standing for a dot."""
    c.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return c


# DIVA's, un2CLIP's and the judge's: AdamW, 24-pixel crops, batches of 8.
_ADAMW = dict(steps=10, batch_size=8, data__image_size=24, diffusion__text_tokens=6, optim__lr=1e-2, optim__warmup=0.2)
_TEXT = TextSpec(context_length=11, vocab_size=60, width=36, heads=3, layers=1, mlp_dim=50)
_CAPTIONED = dataclasses.replace(SPEC, layers=1, text=_TEXT)
_TAUGHT = dict(optim__lr=1e-3, batch_size=16, steps=5)
# Two steps of the projector, three of adapters; four groups of four images.
_DCR = dict(steps=3, batch_size=16, diffusion__text_tokens=6, condition__warmup_steps=2, optim__lr=1e-3)
_DCR |= dict(dcr__group=4, dcr__lora__rank=3)
# Two stages of five steps, batches of 8, one double and one single block.
_GENHANCER = dict(genhancer__lora__rank=3, genhancer__lora__alpha=6.0, genhancer__stage1_steps=5, steps=5, batch_size=8)
_GENHANCER |= {f"genhancer__denoiser__{name}": value for name, value in _DENOISER.items()}
_GENHANCER |= {f"genhancer__vae__{name}": value for name, value in _FLUX_VAE.items()}
# Three texts of 11 tokens and the neutral one, two draws.
_JUDGE = _ADAMW | dict(judge__count=3, judge__beta=30.0, anchor__weight=0.0)
# Batches of 8, for the three by three patches of `SPEC`.
_SALM = dict(steps=8, batch_size=8, salm__adapter__layers=2, salm__adapter__width=30, salm__adapter__heads=3)


def _config(objective: str, first, sd=lambda: "sd21_base", dinov2: str = "", spec=SPEC, **fields):
    """A float32 config; `dinov2` is the section of a teacher of 18 pixels with registers; `fields` as `with_fields`'s,
    over those that are `first`."""
    c = with_fields(config.default(spec, sd(), objective), dict(dtype="float32", frozen_dtype="float32", accum=1))
    if dinov2:
        teacher = dataclasses.asdict(dataclasses.replace(DINOV2_REG, image_size=18))
        with_fields(c, {f"{dinov2}__{name}": value for name, value in teacher.items()})
    return with_fields(c, first | fields)


diva_config = partial(_config, "diva", _ADAMW | dict(optim__name="adamw"), diffusion)
unclip_config = partial(_config, "unclip", _ADAMW, unclip_diffusion)
dcr_config = partial(_config, "dcr", _DCR, diffusion, spec=SPEC_28)
genhancer_config = partial(_config, "genhancer", _GENHANCER, spec=SPEC_28)
kuea_config = partial(_config, "kuea", _TAUGHT | dict(kuea__teacher_crop_from=24), dinov2="kuea__teacher")
_LENGTH = dict(backbone__text__context_length=11)
smartclip_config = partial(_config, "smartclip", _TAUGHT | _LENGTH, spec=_CAPTIONED)
judge_config = partial(_config, "judge", _JUDGE, diffusion, spec=dataclasses.replace(SPEC, text=_TEXT))
_COMCLIP = _TAUGHT | dict(optim__warmup_steps=1, anchor__weight=20.0)
comclip_config = partial(_config, "comclip", _COMCLIP, dinov2="teacher", spec=_CAPTIONED)
salm_config = partial(_config, "salm", _TAUGHT | _SALM, dinov2="teacher")


def program(c, devices: int = 1) -> Program:
    return Program(c, partition.make_mesh(c.mesh, jax.devices()[:devices]))


def random_arrays(p: Program, seed: int = 0) -> dict:
    """Returns every parameter of a program, including the text condition, on its sharding; norms and biases random, the
    kernel of KUEA as in training."""
    rng, out = np.random.default_rng(seed), {}
    for name, a in p.arrays.items():
        noise = rng.normal(size=a.shape)
        if name.endswith("/kernel"):
            value = noise / np.prod(a.shape[:-1]) ** 0.5
        elif name == "kernel_params":
            value = np.array([0.03, 0.19])
        else:
            value = 0.3 * noise + name.endswith("/scale")
        out[name] = jax.device_put(value.astype(a.dtype), p.shardings[name])
    return out


def batch(p: Program, step: int) -> dict:
    """Returns a batch of random images, and of what else the objective takes, the same for any mesh."""
    rng, out = np.random.default_rng((7, step)), {}
    for name, a in p.abstract_batch().items():
        if name == "image":
            b, s, *_ = a.shape
            coarse = rng.integers(0, 256, (b, -(-s // 4), -(-s // 4), 3)).repeat(4, 1).repeat(4, 2)
            out[name] = np.clip(coarse[:, :s, :s] + rng.integers(-20, 21, a.shape), 0, 255)
        elif name == "row":
            out[name] = np.arange(len(a))
        elif name in ("texts", "conditions"):
            text = p.config.backbone.text if name == "texts" else p.config.diffusion.text_encoder
            out[name] = rng.integers(0, text["vocab_size"], a.shape)
            out[name][1::3, -2] = -1  # Texts that there are not, and images that have one to the generator.
            out[name][2::5, 1 if name == "conditions" else 2 : -1] = -1
        else:
            out[name] = rng.integers(0, 256 if a.dtype == np.uint8 else p.config.backbone.text.vocab_size, a.shape)
        out[name] = jax.device_put(out[name].astype(a.dtype), p.batch_sharding)
    return out


class Trained(NamedTuple):
    """A short run: metrics of each step by name; states before and after each, numpy."""

    metrics: dict[str, list[float]]
    states: list[dict]
    frozen: dict
    program: Program


def train(c, steps: int, devices: int = 1, arrays=random_arrays) -> Trained:
    """Trains on `batch`, through the stages, from what `arrays` returns for the program."""
    p, fns, metrics = program(c, devices), {}, {}
    given = arrays(p)
    state, frozen = p.init_state({n: jnp.copy(given[n]) for n in p.trained}), {n: given[n] for n in p.abstract_frozen()}
    states = [jax.tree.map(np.asarray, state)]
    for i in range(steps):
        stage = p.stage_at(i)
        if stage and i == p.stages[stage].start:
            state["opt"] = p.init_opt(stage, state["params"])
        fn = fns[stage] = fns.get(stage) or p.step(stage)
        state, found = fn(state, frozen, batch(p, i))
        for name, value in found.items():
            metrics.setdefault(name, []).append(float(value))
        states.append(jax.tree.map(np.asarray, state))
    return Trained(metrics, states, frozen, p)
