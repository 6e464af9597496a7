"""Configs of diffusers and transformers: full-size names and shapes, defaults, and what is refused."""

import inspect

import diffusers
import pytest
import torch
from flax import nnx
from transformers import CLIPTextConfig, CLIPTextModel

from diva_jax.common.errors import UserError
from diva_jax.models.diffusion import unet, vae
from diva_jax.models.diffusion.presets import PRESETS
from diva_jax.models.diffusion.schedule import ScheduleConfig
from diva_jax.models.layers import Keys
from diva_jax.weights import names
from diva_jax.weights import names as tables

UNET, VAE, TEXT, SCHEDULE = unet.UNetConfig, vae.VAEConfig, unet.TextEncoderConfig, ScheduleConfig
KINDS = {
    "unet": (UNET, unet.UNet, tables.UNET, diffusers.UNet2DConditionModel.from_config),
    "vae": (VAE, vae.VAE, tables.VAE, diffusers.AutoencoderKL.from_config),
    "text_encoder": (TEXT, unet.TextEncoder, tables.TEXT_ENCODER, lambda o: CLIPTextModel(CLIPTextConfig(**o))),
}


# Of the VAE, 83,653,863 parameters in all, those of the decoder are ignored.
@pytest.mark.parametrize(
    ("preset", "part", "parameters"),
    [
        ("sd21_base", "unet", 865_910_724),
        ("sd15", "unet", 859_520_964),
        ("unclip_h", "unet", 870_173_124),
        ("sd21_base", "vae", 34_163_664),
        ("sd21", "text_encoder", 340_387_840),
        ("sd15", "text_encoder", 123_060_480),
    ],
)
def test_full_size_names_and_shapes(preset, part, parameters):
    config, kind, table, original = KINDS[part]
    options = PRESETS[preset][part]
    with torch.device("meta"):
        up = {"up_block_types": ["UpDecoderBlock2D"] * 4} if part == "vae" else {}
        theirs = original(options | up).state_dict()
    ours = names.flat(nnx.eval_shape(lambda: kind(config.from_dict(options), rngs=Keys(0))))
    shapes = {table.torch_name(p): names.torch_shape(p, v.shape) for p, v in ours.items()}
    assert shapes == {name: tuple(t.shape) for name, t in theirs.items() if not table.ignored(name)}
    assert sum(v.size for v in ours.values()) == parameters


@pytest.mark.parametrize(
    ("config", "module", "kind"),
    [(UNET, unet, diffusers.UNet2DConditionModel), (VAE, vae, diffusers.AutoencoderKL)],
    ids=["unet", "vae"],
)
def test_every_option_of_diffusers_is_known_with_its_default(config, module, kind):
    parameters = inspect.signature(kind.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if name != "self"}
    assert set(defaults) == set(module._USED) | set(module._FIXED)
    assert config.from_dict(defaults) == config.from_dict({})


def test_defaults_are_those_of_transformers():
    assert TEXT.from_dict(CLIPTextConfig().to_dict()) == TEXT.from_dict({})


REFUSED = {
    (UNET, "unclip_h", "unet"): [
        *((option, "another") for option in unet._FIXED),
        ("only_cross_attention", [True, True, True, False]),
        ("mid_block_type", None),
        ("transformer_layers_per_block", [1, 2, 10, 10]),
        ("down_block_types", ["DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"]),
        ("up_block_types", ["UpBlock2D", "CrossAttnUpBlock2D"]),
        ("cross_attention_dim", [1024, 1024, 1024, 1024]),
        ("block_out_channels", [320, 640, 1280, 0]),
        ("block_out_channels", []),
        ("layers_per_block", [2, 2]),
        ("attention_head_dim", "8"),
        ("attention_head_dim", 7),
        ("norm_num_groups", 48),
        ("norm_num_groups", None),
        ("projection_class_embeddings_input_dim", None),
        ("a_new_option", 3),
        ("_class_name", "UNet2DModel"),
    ],
    (VAE, "sd21", "vae"): [
        *((option, "another") for option in vae._FIXED),
        ("down_block_types", ["DownEncoderBlock2D"] * 3),
        ("down_block_types", ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]),
        ("norm_num_groups", 48),
        ("layers_per_block", [2, 2, 2, 2]),
        ("a_new_option", 3),
    ],
    (TEXT, "sd21", "text_encoder"): [
        ("hidden_act", "gelu_new"),
        ("model_type", "t5"),
        ("num_attention_heads", 15),
        ("hidden_size", "1024"),
    ],
    (SCHEDULE, "sd21", "scheduler"): [
        ("beta_schedule", "sigmoid"),
        ("prediction_type", "sample"),
        ("trained_betas", [0.1, 0.2]),
        ("rescale_betas_zero_snr", True),
        ("num_train_timesteps", 0),
    ],
}
SAID = {"_class_name": "UNet2DConditionModel", "model_type": "CLIPTextModel"}  # Where it is not the option's name.


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind[2])
def test_refused_options_are_named(kind):
    config, preset, part = kind
    for option, value in REFUSED[kind]:
        with pytest.raises(UserError, match=SAID.get(option, option)) as e:
            config.from_dict(PRESETS[preset][part] | {option: value})
        assert "\n" not in str(e.value)
