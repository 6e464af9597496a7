"""What an architecture states about its model in transformers: names, layouts and config files.

A `Recipe` says how some tensors of one side make some of the other: joined along the first axis, transposed or
reshaped, and split again. Values are moved, never computed, so both ways are exact; `weights.names` carries them out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from diva_jax.common.errors import UserError, brief, listing
from diva_jax.common.fields import between, one_of
from diva_jax.common.json_files import packaged
from diva_jax.models.backbones import Spec, TextSpec
from diva_jax.models.library_config import LibraryConfig

_RECIPES = packaged(__file__, "transformers.json")


class Recipe(NamedTuple):
    """`open_clip` tensors, one after the other, hold the same rows as the `hf` ones. The rows divide among the
    open_clip names as `shares`, among hf names evenly. `transposed`: the matrix is [in, out] in open_clip and [out, in]
    in transformers. `lead`: a leading axis of 1 that open_clip has and transformers has not (-1: the other way round).
    """

    open_clip: tuple[str, ...]
    hf: tuple[str, ...]
    shares: tuple[int, ...] = (1,)
    transposed: bool = False
    lead: int = 0


class Layout(NamedTuple):
    """The model of an architecture in transformers: `model_type` in config.json -> the class of the whole model. `mark`
    is how the names of tensors begin that tell the folder's layout; `recipes` are those of every tensor of the whole
    model. `from_config` is (config.json, preprocessor_config.json or {}, the folder for messages) -> (spec, the fields
    of it that the folder does not really tell); `to_config` raises a UserError where transformers has no such model;
    `processor` is how the name of its image processor begins."""

    models: Mapping[str, str]
    mark: str
    from_config: Callable[[Mapping, Mapping, str], tuple[Spec, frozenset[str]]]
    to_config: Callable[[Spec, str], dict]
    processor: str

    def recipes(self, spec: Spec) -> list[Recipe]:
        """The recipes of all tensors of the model: each group of transformers.json once or, with {i} in names replaced
        by the number of the block, for each block."""
        out, layers, swiglu = [], spec.layers, spec.activation == "swiglu"
        counts = dict(vision=layers, scales=layers, mlp=layers * (not swiglu), swiglu=layers * swiglu)
        counts |= dict(text=spec.text.layers, registers=int(spec.registers > 0))
        for group, rows in _RECIPES[spec.arch].items():
            for i in range(counts.get(group, 1)):
                for row in rows:
                    names = {side: tuple(n.replace("{i}", str(i)) for n in row[side]) for side in ("open_clip", "hf")}
                    out.append(Recipe(**row | names))
        return out


# Our name of an activation -> transformers'.
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def options(config: Any, defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options of a config file, or of a section of it (None: it is not there), over transformers' defaults. A
    UserError where it is no JSON object, or an option has not the type of its default, or is far out of range."""
    if not isinstance(config, Mapping | None):
        raise UserError(f"{where} is {brief(config)}, which must be an object of options: fetch the folder again")
    file, rules = LibraryConfig(config or {}, where), {int: between(0, 2**20), float: between(0, 2**20)}
    return dict(file.options) | {name: file.get(name, d, rules.get(type(d))) for name, d in defaults.items()}


# How the names of image processors begin -> whether they crop where their config does not say so.
_PROCESSORS = {"CLIP": True, "Bit": True, "Siglip": False, "ViT": False}
_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # By their numbers in Pillow.
_OPTIONS = packaged(__file__, "options.json")
_PROCESSOR = _OPTIONS["image_processor"]
DEFAULTS = _OPTIONS["transformers"]  # By architecture, what transformers' config files leave out.


def _side(file: LibraryConfig, name: str, square: bool) -> tuple[int, bool]:
    """(the side, whether it is that of a square and not the shorter one's) of `size` or `crop_size`; default 224."""
    value = 224 if file.options.get(name) is None else file.options[name]
    sides = value if isinstance(value, Mapping) else {"height" if square else "shortest_edge": value}
    sides = {k: v for k, v in sides.items() if v is not None}
    sides |= {"width": sides["height"]} if sides.keys() == {"height"} else {}
    known = sides.keys() in ({"shortest_edge"}, {"height", "width"}) and len({repr(v) for v in sides.values()}) == 1
    if not known or type(side := next(iter(sides.values()))) is not int or not 0 < side <= 2**14:
        file.refuse(name, "it must be a shortest_edge, or a height and a width that are equal, in pixels")
    return side, "height" in sides


def preprocessing(
    preprocessor: Mapping, image_size: int, mean: Sequence, std: Sequence, where: str, *, crops=True, any_size=False
) -> dict[str, Any]:
    """The fields of Spec that preprocessor_config.json ({} where there is none) states: size, mean, std, resize_mode
    and interpolation. `image_size` is that of config.json [pixels]; `mean`, `std` and `crops` are the defaults of the
    model's processor; with `any_size` transformers interpolates the position embeddings where images are of another
    size. Images that are resized to `image_size` by their shorter side and cropped are cropped where open_clip does,
    which is one pixel elsewhere where the rest is odd. A UserError for an option that is not implemented, or makes
    images of another size than the model's."""
    where = f"{where}/preprocessor_config.json (or processor_config.json)"
    file = LibraryConfig(options(preprocessor, {}, where), where)
    file.check(_PROCESSOR["read"], _PROCESSOR["fixed"])
    kind = preprocessor.get("image_processor_type") or preprocessor.get("feature_extractor_type")
    if kind is not None:
        known = [k for k in _PROCESSORS if isinstance(kind, str) and kind.startswith(k)]
        if not known:
            file.refuse("image_processor_type", f"use one of {listing([f'{k}ImageProcessor' for k in _PROCESSORS])}")
        crops = _PROCESSORS[known[0]]
    normalised = file.get("do_normalize", True)
    fields = dict(
        mean=file.channels("image_mean", mean) if normalised else (0.0,) * 3,
        std=file.channels("image_std", std) if normalised else (1.0,) * 3,
        interpolation=_FILTERS[file.get("resample", 3, between(0, 5))],
    )
    if not preprocessor:
        return fields | dict(image_size=image_size, resize_mode="shortest" if crops else "squash")
    if abs(file.get("rescale_factor", 1 / 255, between(0, 1)) * 255 - 1) > 1e-4:
        file.refuse("rescale_factor", "it must be 1/255")
    by_default = file.get("default_to_square", not crops)
    (side, square), crops = _side(file, "size", by_default), file.get("do_center_crop", crops)
    final = _side(file, "crop_size", True)[0] if crops else side
    if not crops and not square:
        file.refuse("do_center_crop", "without a crop, size must be a height and a width")
    if side < final:
        file.refuse("crop_size", f"it must not be larger than size, {side}")
    if final != image_size and not any_size:
        file.refuse("crop_size" if crops else "size", f"images must have the image_size of config.json, {image_size}")
    mode = "squash" if square else "shortest"
    return fields | dict(image_size=final, resize_mode=mode if side == final else f"{mode}:{side}")


def our_activation(config: Mapping[str, Any], where: str) -> str:
    """Our name of `hidden_act`; a UserError where it is not implemented."""
    ours = {theirs: name for name, theirs in ACTIVATIONS.items()}
    return ours[LibraryConfig(config, where).get("hidden_act", "", one_of(*ours))]


def their_activation(name: str) -> str:
    """transformers' name of our activation; a UserError where it has none."""
    if name not in ACTIVATIONS:
        raise UserError(f"transformers has no activation={name!r}: use one of {listing(list(ACTIVATIONS))}")
    return ACTIVATIONS[name]


# Field of a Spec or TextSpec -> transformers' option of a tower.
VISION, _TEXT = _OPTIONS["vision_fields"], _OPTIONS["text_fields"]


def text_spec(config: Mapping[str, Any], vision_activation: str, activation: str, **others) -> TextSpec:
    """The TextSpec of a `text_config` with all of its options, and both towers' activations by our names."""
    own = {field: config[option] for field, option in _TEXT.items() if field != "activation"}
    return TextSpec(**own, activation="" if activation == vision_activation else activation, **others)


def vision_fields(config: Mapping[str, Any]) -> dict:
    """A `vision_config` with all of its options, but for the activation, as fields of Spec."""
    return {field: config[option] for field, option in VISION.items() if field != "activation"}


def require_text(spec: Spec, known: bool) -> None:
    """A UserError where transformers has not such a text tower, of this architecture."""
    if not known:
        rules = ", ".join(f"{name}={getattr(spec.text, name)!r}" for name in ("causal", "pool", "proj_bias"))
        raise UserError(f"transformers has no {spec.arch} text tower with {rules}: use --format=open_clip")


def two_towers(spec: Spec, dtype: str, kind: str, model: str, vision: Mapping, text: Mapping, **options) -> dict:
    """The config.json of the class `model`, of the model type `kind`; `vision`, `text` and `options` are what towers
    and model have beside their sizes."""
    sizes = {option: getattr(spec, field) for field, option in VISION.items()}
    sizes |= dict(hidden_act=their_activation(spec.activation), num_channels=3)
    text_sizes = {option: getattr(spec.text, field) for field, option in _TEXT.items()}
    text_sizes |= dict(hidden_act=their_activation(spec.text.activation or spec.activation))
    return dict(
        architectures=[model],
        model_type=kind,
        dtype=dtype,
        **options,
        vision_config=sizes | dict(vision) | dict(model_type=f"{kind}_vision_model"),
        text_config=text_sizes | dict(text) | dict(model_type=f"{kind}_text_model"),
    )


def tower_options(config: Mapping, defaults: Mapping[str, Mapping], where: str) -> Iterator[tuple[dict, str]]:
    """The options of each tower, the names of its section and its defaults, over these; and our activation."""
    for name, own in defaults.items():
        # Older versions wrote a tower's options a second time, which hold where they are there.
        found = options(config.get(f"{name}_dict") or config.get(name), own, f"{where}: {name}")
        yield found, our_activation(found, where)


def image_processor(spec: Spec, name: str) -> dict:
    """The content of preprocessor_config.json; `name` is `Layout.processor`, and CLIP's takes its place where images
    are cropped and it does not crop."""
    name = name if _PROCESSORS[name] or spec.resize_mode == "squash" else "CLIP"
    side, crop = spec.resize, dict(height=spec.image_size, width=spec.image_size)
    side_of = dict(height=side, width=side) if spec.resize_mode.startswith("squash") else dict(shortest_edge=side)
    own = dict(image_processor_type=f"{name}ImageProcessor", size=side_of, crop_size=crop)
    own |= dict(do_center_crop=spec.resize_mode != "squash")
    own |= dict(resample=_FILTERS.index(spec.interpolation), image_mean=list(spec.mean), image_std=list(spec.std))
    return _PROCESSOR["written"] | own | dict(rescale_factor=1 / 255)
