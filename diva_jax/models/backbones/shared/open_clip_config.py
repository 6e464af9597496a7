"""Two-way between our `Spec` and open_clip's `open_clip_config.json`, with the defaults of `CLIPVisionCfg` and
`CLIPTextCfg`.

An option that our modules do not implement is an error that names it; it never gives another model silently. The vision
tower's options are read and written by its architecture's module, with the functions here.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from diva_jax.common.errors import UserError, listing
from diva_jax.common.fields import between, one_of
from diva_jax.common.json_files import packaged
from diva_jax.models import backbones
from diva_jax.models.backbones import OPENAI_MEAN, OPENAI_STD, Spec, TextSpec
from diva_jax.models.library_config import LibraryConfig
from diva_jax.models.names import Positions, Table, depth, tensor_shape

_WHERE = "open_clip's config"

OPTIONS = packaged(__file__, "options.json")["open_clip"]
# Options of either tower that must be as given (None: or absent), and all such options of the text tower.
TOWER_FIXED = OPTIONS["tower_fixed"]
_TEXT_FIXED = TOWER_FIXED | OPTIONS["text_fixed"]
# Options that open_clip reads only where the tower is timm's, and their defaults.
TIMM_DEFAULTS = OPTIONS["timm_defaults"]
# Options of the text tower that are fields of TextSpec, and their defaults.
_TEXT_SIZES = dict(context_length=77, vocab_size=49408, width=512, heads=8, layers=12)
# Tokens of the vocabulary that open_clip has built in.
OPENAI_VOCABULARY = 49408
_CLIP_CLEAN = {"clean": "lower"}
_SIGLIP_CLEAN = {"clean": "canonicalize"}
# The tokenizer that each SigLIP vocabulary belongs to: English, multilingual, SigLIP 2's.
_SIGLIP_TOKENIZERS = packaged(__file__, "options.json")["siglip_tokenizers"]
_RESIZE_MODES, _INTERPOLATIONS = ("shortest", "squash"), ("bicubic", "bilinear")
_XLM_TOKENIZER = "facebook/xlm-v-base"


class Checkpoint(NamedTuple):
    """The checkpoints of an architecture. `mark` is the tensor, without `visual.`, by which they are recognised;
    `vision` and `text` are the tables between our towers and open_clip's names, `text` None without a text tower;
    `positions` the learned position embeddings. `sizes` are the names of the patch embedding's weight, of the blocks,
    without numbers, and, within a block, of the weight of the MLP's first layer; `embed` the tensor and the axis of the
    embedding's width, None where it is the tower's. `others` are the tensors that belong to neither tower and are kept
    in exports. `preprocess` has mean, std, resize_mode and interpolation where a config states none. `library`,
    "open_clip" or "timm", reads the vision tower's state dict. `timm` are the models of timm's of which open_clip
    builds the tower -> the fields of `Spec` that each fixes; "" stands for open_clip's own tower. `timm_options` are
    open_clip's options of them -> the values that mean what is implemented."""

    arch: str
    mark: str
    vision: Table
    text: Table | None
    positions: Positions
    sizes: tuple[str, str, str]
    embed: tuple[str, int] | None
    others: tuple[str, ...]
    preprocess: Mapping[str, Any]
    library: str
    timm: dict[str, Mapping[str, Any]]
    timm_options: Mapping[str, tuple] = {}

    def shapes(self, tensors: Mapping, fc1: str = "") -> dict[str, Any]:
        """The fields of `Spec` that a checkpoint's shapes tell: all but the heads and the activation. `fc1` is another
        name of the weight of the MLPs' first layer."""
        patch_embed, blocks, layer = self.sizes
        width, _, _, patch = tensor_shape(tensors, patch_embed, 4)
        return dict(
            arch=self.arch,
            image_size=self.positions.grid(tensors) * patch,
            patch_size=patch,
            width=width,
            layers=depth(tensors, blocks),
            mlp_dim=tensor_shape(tensors, f"{blocks}.0.{fc1 or layer}")[0],
            embed_dim=tensor_shape(tensors, self.embed[0])[self.embed[1]] if self.embed else width,
        )


def checkpoint(arch: str) -> Checkpoint:
    """The checkpoints of an architecture, from checkpoints.json. A model that open_clip makes with `custom_text` has
    its text tower under `text.`. Where the prefix is empty, both are read and the names without it are written."""
    tables = packaged(__file__, "checkpoints.json")
    row, all_ = dict(tables[arch]), tables["shared"]
    rename = (*(all_["blocks"] if row.pop("own_blocks", False) else ()), *row.pop("rename"))
    ignore = row.pop("ignore", (*all_["text_names"], *all_["neither"]))
    text, prefix = None, row.pop("text_prefix")
    if prefix is not None:
        names, aliases = (*all_["blocks"], *all_["text"], ("^", prefix)), () if prefix else ((r"^text\.", ""),)
        text = Table(f"{arch} text tower", names, ignore=(r"visual\..+", *all_["neither"]), aliases=aliases)
    models = {"": {}} | packaged(__file__, "timm.json")
    row["timm"] = {name: fields for name, fields in models.items() if re.fullmatch(row["timm"], name)}
    positions = Positions(**row.pop("positions"))
    return Checkpoint(
        arch=arch, vision=Table(f"{arch} vision tower", rename, ignore), text=text, positions=positions, **row
    )


def side(file: LibraryConfig, name: str, default: int) -> int:
    """The side of a square, which may come as a pair."""
    value = file.options.get(name, default)
    if isinstance(value, list | tuple) and value and value == value[:1] * len(value):
        return LibraryConfig({name: value[0]}, file.where, file.prefix).get(name, default)
    return file.get(name, default)


def activation(tower: LibraryConfig, quick_gelu: bool) -> str:
    """Our name of a tower's activation, a key of `layers.ACTIVATIONS`."""
    options = tower.section("act_kwargs").options
    if quick_gelu and not options:
        return "quick_gelu"
    names = {"none": "gelu", "tanh": "gelu_tanh"}
    if quick_gelu or set(options) - {"approximate"} or options.get("approximate", "none") not in [*names]:
        tower.refuse("act_kwargs", 'use {"approximate": "tanh"} without quick_gelu')
    return names[options.get("approximate", "none")]


def norm_eps(tower: LibraryConfig) -> float:
    """The epsilon of a tower's norms."""
    options = tower.section("norm_kwargs")
    options.check(("eps",), {})
    return options.get("eps", 1e-5, between(0, 1))


def _from_timm(model: LibraryConfig, known: Checkpoint) -> dict:
    """The fields of Spec of a tower that open_clip makes of a model of timm, one of `known.timm`."""
    vision = model.section("vision_cfg")
    name = vision.options["timm_model_name"]
    fields = known.timm[name]
    # An option that is left out has open_clip's default, which may not be implemented.
    given = LibraryConfig(TIMM_DEFAULTS | dict(vision.options), vision.where, vision.prefix)
    fixed = {k: (default,) for k, default in TIMM_DEFAULTS.items()} | known.timm_options
    fixed |= {"timm_drop_path": (None, 0), "timm_proj_bias": (False, True)}
    read = {"timm_model_name", "image_size", *OPTIONS["vision_without_effect"], *OPTIONS["not_timm"], *TOWER_FIXED}
    given.check(read, fixed | {"patch_dropout": (0,)})
    embed_dim = model.options.get("embed_dim")
    if embed_dim != fields.get("embed_dim", embed_dim):
        model.refuse("embed_dim", f"{name} has no projection, so it must be {fields['embed_dim']}")
    if side(vision, "image_size", 224) != fields["image_size"]:
        vision.refuse("image_size", f"open_clip builds {name} at {fields['image_size']}")
    if not model.get("custom_text", False):
        model.refuse("custom_text", f"a model of {name} keeps its text tower under `text.`, so it must be true")
    return dict(fields)


def _to_timm(spec: Spec, known: Checkpoint) -> dict:
    """open_clip's model config of the vision tower, a model of `known.timm`."""
    differing = {n: {f for f, value in row.items() if getattr(spec, f) != value} for n, row in known.timm.items()}
    name = next((n for n, other in differing.items() if not other), None)
    if name is None:
        if name := next((n for n, other in differing.items() if other == {"activation"}), None):
            problem = f"open_clip runs {name} with activation={known.timm[name]['activation']}"
            problem += f" and has no option for {spec.activation}"
            raise UserError(f"{problem}: use --format=hf, since transformers computes what was tuned")
        asked = f"width {spec.width}, {spec.layers} layers, {spec.heads} heads, mlp_dim {spec.mlp_dim}"
        asked += f", patch {spec.patch_size}, {spec.image_size} px, {spec.activation}"
        problem = f"open_clip builds a {spec.arch} tower from timm's list, which has none of {asked}"
        raise UserError(f"{problem}: use one of {listing(list(known.timm))}")
    vision = dict(image_size=spec.image_size, timm_model_name=name, timm_model_pretrained=False)
    vision |= {option: values[0] for option, values in known.timm_options.items()}
    bias = {"init_logit_bias": -10} if "logit_bias" in known.others else {}
    return bias | dict(custom_text=True, vision_cfg=vision)


def _tokenizer(text: LibraryConfig) -> str:
    name, kwargs = text.options.get("hf_tokenizer_name") or "", text.options.get("tokenizer_kwargs") or {}
    if not isinstance(name, str):
        text.refuse("hf_tokenizer_name", "it must be a text")
    if name and kwargs in (_CLIP_CLEAN, _SIGLIP_CLEAN):
        return "clip" if kwargs == _CLIP_CLEAN else "siglip"
    if kwargs:
        text.refuse("tokenizer_kwargs", f"only {_SIGLIP_CLEAN}, with hf_tokenizer_name, is known")
    if "xlm-v" in name.lower():
        return "xlm"
    if name and "clip" not in name.lower():
        text.refuse("hf_tokenizer_name", "the tokenizers known are CLIP's, SigLIP's and XLM-V's")
    return "clip"


def _text(text: LibraryConfig, vision_activation: str, quick_gelu: bool) -> TextSpec:
    text.check({*OPTIONS["text"], *OPTIONS["text_without_effect"]}, _TEXT_FIXED)
    text_activation = activation(text, quick_gelu)
    pool = text.get("pool_type", "argmax", one_of("argmax", "eos", "last"))
    width, heads = (text.get(name, _TEXT_SIZES[name]) for name in ("width", "heads"))
    if width % heads:
        text.refuse("heads", f"it must divide the width, {width}")
    return TextSpec(
        **{name: text.get(name, default) for name, default in _TEXT_SIZES.items()},
        mlp_dim=int(width * text.get("mlp_ratio", 4.0, between(1e-6, 1e6))),
        causal=not text.get("no_causal_mask", False),
        pool=pool,
        proj_bias=text.get("proj_bias", False),
        norm_eps=norm_eps(text),
        tokenizer=_tokenizer(text),
        activation="" if text_activation == vision_activation else text_activation,
        eos_id=text.get("eos_id", 2, between(0, 2**20)) if pool == "eos" else 2,
    )


def _preprocess(file: LibraryConfig, default: dict) -> dict:
    """Mean, std, resize; without a `preprocess_cfg` what all published models of the architecture use."""
    if "preprocess_cfg" not in file.options:
        return default
    given = file.section("preprocess_cfg")
    given = LibraryConfig({k: v for k, v in given.options.items() if v}, given.where, given.prefix)
    return dict(
        mean=given.channels("mean", OPENAI_MEAN),
        std=given.channels("std", OPENAI_STD),
        resize_mode=given.get("resize_mode", "shortest", one_of(*_RESIZE_MODES)),
        interpolation=given.get("interpolation", "bicubic", one_of(*_INTERPOLATIONS)),
    )


def from_open_clip(config: Mapping, *, name: str = "", source: str = "") -> Spec:
    """The `Spec` of a parsed `open_clip_config.json` or bare model config, with select and readout at their defaults; a
    UserError where it is none, and for an option that our modules do not implement."""
    model = config.get("model_cfg", config) if isinstance(config, Mapping) else None
    parts = ("vision_cfg", "text_cfg")
    if not isinstance(model, Mapping) or not all(isinstance(model.get(k), Mapping) for k in parts):
        raise UserError(f"{_WHERE} cannot be used: it needs a model_cfg with embed_dim, vision_cfg and text_cfg")
    file, model = LibraryConfig(config, _WHERE), LibraryConfig(model, _WHERE)
    model.check({*OPTIONS["model"], *(["preprocess_cfg"] if model.options is config else [])}, {})
    vision, architectures = model.section("vision_cfg"), backbones.architectures()
    timm = vision.options.get("timm_model_name") or ""
    arch = next((a for a, m in architectures.items() if isinstance(timm, str) and timm in m.CHECKPOINT.timm), None)
    if arch is None:
        known = "of timm's models only vit_*_siglip_* and eva02_{base,large}_*_clip_* are implemented"
        vision.refuse("timm_model_name", known)
    module = architectures[arch]
    fields = module.from_open_clip(model) if timm == "" else _from_timm(model, module.CHECKPOINT)
    fields |= dict(arch=arch, embed_dim=model.get("embed_dim", 0))
    return Spec(
        open_clip_name=name,
        source=source,
        text=_text(model.section("text_cfg"), fields["activation"], model.get("quick_gelu", False)),
        **fields,
        **_preprocess(file, module.CHECKPOINT.preprocess),
    )


def mlp_ratio(width: int, mlp_dim: int) -> float:
    """A ratio of which open_clip's `int(width * ratio)` gives exactly `mlp_dim`."""
    ratio = mlp_dim / width
    return ratio if int(width * ratio) == mlp_dim else (mlp_dim + 0.5) / width


def tower_options(activation_name: str, eps: float) -> dict:
    """The options that a tower needs for its activation and the epsilon of its norms, where they are not defaults."""
    options = {} if eps == 1e-5 else {"norm_kwargs": {"eps": eps}}
    return options | ({"act_kwargs": {"approximate": "tanh"}} if activation_name == "gelu_tanh" else {})


def _text_cfg(spec: Spec) -> dict:
    text = spec.text
    cfg = dict(
        **{name: getattr(text, name) for name in _TEXT_SIZES},
        mlp_ratio=mlp_ratio(text.width, text.mlp_dim),
        no_causal_mask=not text.causal,
        pool_type=text.pool,
        proj_bias=text.proj_bias,
        **({"eos_id": text.eos_id} if text.pool == "eos" else {}),
        **tower_options(text.activation or spec.activation, text.norm_eps),
    )
    if text.tokenizer == "siglip":
        # From a folder open_clip takes the tokenizer files beside the weights, whatever this name is.
        cfg["hf_tokenizer_name"] = _SIGLIP_TOKENIZERS.get(str(text.vocab_size), _SIGLIP_TOKENIZERS["32000"])
        cfg["tokenizer_kwargs"] = dict(_SIGLIP_CLEAN)
    elif text.tokenizer == "xlm":
        cfg["hf_tokenizer_name"] = _XLM_TOKENIZER
    elif text.vocab_size != OPENAI_VOCABULARY:
        cfg["hf_tokenizer_name"] = "clip"
        cfg["tokenizer_kwargs"] = dict(_CLIP_CLEAN)
    return cfg


def _text_activation(spec: Spec, tower: Mapping) -> dict:
    """open_clip's `quick_gelu`, which its own vision tower and the text tower share and timm's do not read."""
    name = spec.text.activation or spec.activation
    if name not in ("quick_gelu", "gelu", "gelu_tanh"):
        raise UserError(f"open_clip has no activation={name!r}: use quick_gelu, gelu or gelu_tanh")
    quick = name == "quick_gelu"
    if tower.get("quick_gelu", quick) != quick:
        problem = "open_clip has one quick_gelu for both towers"
        raise UserError(f"{problem}: {name} in the text and {spec.activation} in the vision tower cannot be written")
    return {"quick_gelu": True} if quick else {}


def to_open_clip(spec: Spec) -> dict:
    """The content of `open_clip_config.json`; a UserError where open_clip has no such tower or activation."""
    module = backbones.architecture(spec.arch)
    if not module.CHECKPOINT.timm:
        raise UserError(f"open_clip has no {spec.arch} model: use --format=hf or --format=pt")
    tower = module.to_open_clip(spec) if "" in module.CHECKPOINT.timm else _to_timm(spec, module.CHECKPOINT)
    if spec.resize_mode not in _RESIZE_MODES or spec.interpolation not in _INTERPOLATIONS:
        problem = f"resize_mode={spec.resize_mode} and interpolation={spec.interpolation}"
        raise UserError(f"open_clip cannot prepare images with {problem}: use --format=hf")
    sizes = dict(embed_dim=spec.embed_dim, **tower | _text_activation(spec, tower), text_cfg=_text_cfg(spec))
    resize = dict(interpolation=spec.interpolation, resize_mode=spec.resize_mode)
    preprocess = dict(size=spec.image_size, mode="RGB", mean=list(spec.mean), std=list(spec.std), **resize)
    return dict(model_cfg=sizes, preprocess_cfg=preprocess)
