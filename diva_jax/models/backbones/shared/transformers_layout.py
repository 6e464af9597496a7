"""What an architecture states about its model in transformers: names, layouts and config files.

A `Recipe` says how some tensors of one side make some of the other: joined along the first axis, transposed or
reshaped, and split again. Values are moved, never computed, so both ways are exact; `weights.hf` carries them out.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diva_jax.common.errors import UserError, brief, listing
from diva_jax.common.fields import finite
from diva_jax.models.backbones import Spec, TextSpec


@dataclasses.dataclass(frozen=True)
class Recipe:
    """`open_clip` tensors, one after the other, hold the same rows as the `hf` ones.

    Attributes:
      open_clip, hf: names.
      shares: how the rows divide among the open_clip names (among hf names they divide evenly).
      transposed: the matrix is [in, out] in open_clip and [out, in] in transformers.
      lead: a leading axis of 1 that open_clip has and transformers has not (-1: the other way round).
    """

    open_clip: tuple[str, ...]
    hf: tuple[str, ...]
    shares: tuple[int, ...] = (1,)
    transposed: bool = False
    lead: int = 0


@dataclasses.dataclass(frozen=True)
class Layout:
    """The model of an architecture in transformers.

    Attributes:
      models: `model_type` in config.json -> the class of the whole model.
      mark: how the names of tensors begin that tell the folder's layout.
      recipes: spec -> recipes of every tensor of the whole model.
      from_config: (config.json, preprocessor_config.json or {}, the folder for messages) -> (spec, the fields of it
        that the folder does not really tell).
      to_config: (spec, dtype of the weights) -> config.json; a UserError where transformers has no such model.
      preprocessor: spec -> preprocessor_config.json, the test-time transform.
    """

    models: Mapping[str, str]
    mark: str
    recipes: Callable[[Spec], list[Recipe]]
    from_config: Callable[[Mapping, Mapping, str], tuple[Spec, frozenset[str]]]
    to_config: Callable[[Spec, str], dict]
    preprocessor: Callable[[Spec], dict]


LEAVES = ("weight", "bias")
_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_QUERIES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# Our name of an activation -> transformers'.
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def both(open_clip: str, hf: str) -> list[Recipe]:
    """The weight and the bias of a layer."""
    return [Recipe((f"{open_clip}.{leaf}",), (f"{hf}.{leaf}",)) for leaf in LEAVES]


def layers(
    count: int, open_clip: str, hf: str, names: Mapping[str, str], fused: str, parts: Sequence[str]
) -> list[Recipe]:
    """`count` transformer blocks.

    Args:
      count: blocks.
      open_clip, hf: the names before the number of the block.
      names: layers of one block, open_clip's name -> transformers'.
      fused: open_clip's joint projection to queries, keys and values, without its leaf.
      parts: transformers' projections to queries, keys and values, without their leaf.
    """
    out = []
    for i in range(count):
        a, b = f"{open_clip}.{i}", f"{hf}.{i}"
        for leaf in LEAVES:
            out.append(Recipe((f"{a}.{fused}{leaf}",), tuple(f"{b}.{part}.{leaf}" for part in parts)))
        for mine, its in names.items():
            out += both(f"{a}.{mine}", f"{b}.{its}")
    return out


def clip_layers(
    count: int, open_clip: str, model: str, names: Mapping[str, str] = _LAYER, fused: str = "attn.in_proj_"
):
    """`layers` of a tower of CLIPModel or SiglipModel; `model` is "vision_model" or "text_model"."""
    return layers(count, open_clip, f"{model}.encoder.layers", names, fused, _QUERIES)


def text_recipes(text: TextSpec, prefix: str) -> list[Recipe]:
    """The text tower without its projection; `prefix` is that of open_clip's names."""
    t = "text_model"
    return [
        Recipe((f"{prefix}token_embedding.weight",), (f"{t}.embeddings.token_embedding.weight",)),
        Recipe((f"{prefix}positional_embedding",), (f"{t}.embeddings.position_embedding.weight",)),
        *clip_layers(text.layers, f"{prefix}transformer.resblocks", t),
        *both(f"{prefix}ln_final", f"{t}.final_layer_norm"),
    ]


def options(config: Any, defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options of a config file, or of a section of it, over transformers' defaults.

    Args:
      config: as read; None for a section that is not there.
      defaults: option -> default.
      where: the folder, and the section, for messages.

    Raises:
      UserError: it is no JSON object, or an option has not the type of its default.
    """
    if not isinstance(config, Mapping | None):
        raise UserError(f"{where} is {brief(config)}, which must be an object of options: fetch the folder again")
    found = {**defaults, **(config or {})}
    for name, default in defaults.items():
        kinds = (int, float) if isinstance(default, float) else type(default)
        good = isinstance(found[name], kinds) and isinstance(found[name], bool) == isinstance(default, bool)
        if not good or (isinstance(found[name], int | float) and not abs(found[name]) < 2**53):
            kind = "number" if isinstance(default, float) else type(default).__name__
            raise UserError(f"{where} has {name}={brief(found[name])}, which must be a {kind}: fetch the folder again")
    return found


def channels(preprocessor: Mapping[str, Any], name: str, default: Sequence[float], where: str) -> tuple[float, ...]:
    """`image_mean` or `image_std` of preprocessor_config.json.

    Raises:
      UserError: it is no list of three numbers.
    """
    value = preprocessor.get(name) or default
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(map(finite, value)):
        raise UserError(f"{where}/preprocessor_config.json has {name}={brief(value)}, which must be three numbers")
    return tuple(value)


def our_activation(config: Mapping[str, Any], where: str) -> str:
    """Our name of `hidden_act`.

    Raises:
      UserError: it is not implemented.
    """
    ours = {theirs: name for name, theirs in ACTIVATIONS.items()}
    if config["hidden_act"] not in ours:
        raise UserError(f"{where} has hidden_act={brief(config['hidden_act'])}: use one of {listing(list(ours))}")
    return ours[config["hidden_act"]]


def their_activation(name: str) -> str:
    """transformers' name of our activation.

    Raises:
      UserError: transformers has none.
    """
    if name not in ACTIVATIONS:
        raise UserError(f"transformers has no activation={name!r}: use one of {listing(list(ACTIVATIONS))}")
    return ACTIVATIONS[name]


def text_spec(config: Mapping[str, Any], **others) -> TextSpec:
    """The TextSpec of a `text_config` with all of its options."""
    return TextSpec(
        context_length=config["max_position_embeddings"],
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        layers=config["num_hidden_layers"],
        mlp_dim=config["intermediate_size"],
        norm_eps=config["layer_norm_eps"],
        **others,
    )


def vision_fields(config: Mapping[str, Any]) -> dict:
    """The sizes of a `vision_config` with all of its options, as fields of Spec."""
    return dict(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        norm_eps=config["layer_norm_eps"],
    )


def tower_config(tower: Spec | TextSpec, activation: str) -> dict:
    """The sizes of a tower as its config in transformers."""
    return dict(
        hidden_size=tower.width,
        intermediate_size=tower.mlp_dim,
        num_hidden_layers=tower.layers,
        num_attention_heads=tower.heads,
        hidden_act=their_activation(activation),
        layer_norm_eps=tower.norm_eps,
    )


def vision_config(spec: Spec) -> dict:
    """The `vision_config` of a tower, without its `model_type`."""
    sizes = dict(image_size=spec.image_size, patch_size=spec.patch_size, num_channels=3)
    return tower_config(spec, spec.activation) | sizes


def text_config(spec: Spec) -> dict:
    """The `text_config` of a tower, without its `model_type` and special tokens."""
    text = spec.text
    sizes = dict(vocab_size=text.vocab_size, max_position_embeddings=text.context_length)
    return tower_config(text, text.activation or spec.activation) | sizes


def image_processor(spec: Spec, kind: str, **options) -> dict:
    """The content of preprocessor_config.json for the image processor `kind`."""
    squash = dict(height=spec.image_size, width=spec.image_size)
    return dict(
        image_processor_type=kind,
        do_convert_rgb=True,
        do_resize=True,
        size=squash if spec.resize_mode == "squash" else dict(shortest_edge=spec.image_size),
        resample={"bicubic": 3, "bilinear": 2}[spec.interpolation],
        **options,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(spec.mean),
        image_std=list(spec.std),
    )


def clip_image_processor(spec: Spec) -> dict:
    """preprocessor_config.json for CLIPImageProcessor."""
    crop = dict(height=spec.image_size, width=spec.image_size)
    return image_processor(spec, "CLIPImageProcessor", do_center_crop=spec.resize_mode != "squash", crop_size=crop)


def squashes(preprocessor: Mapping[str, Any]) -> bool:
    """Whether a CLIPImageProcessor's config resizes without a crop."""
    return "size" in preprocessor and not preprocessor.get("do_center_crop", True)
