"""Two-way between our `Spec` and open_clip's `open_clip_config.json`.

Defaults and the meaning of every option are those of open_clip's `CLIPVisionCfg` and `CLIPTextCfg`. An option that
our modules do not implement is an error that names it; it never gives another model silently. The vision tower's
options are read and written by its architecture's module, with the functions here.
"""

from collections.abc import Callable, Mapping

from diva_jax.common.errors import UserError, brief, listing
from diva_jax.common.fields import finite
from diva_jax.models import backbones
from diva_jax.models.backbones import OPENAI_MEAN, OPENAI_STD, Spec, TextSpec

# Options of either tower that must be as given (None: or absent).
TOWER_FIXED = {
    "ls_init_value": (None,),
    "block_type": (None, "default"),
    **dict.fromkeys(
        ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), (False,)
    ),
    "final_ln_after_pool": (False,),
}
# Options of the vision tower that change no value of ours.
VISION_FREE = {"attn_pooler_queries", "attn_pooler_heads", "output_tokens", "timm_model_pretrained"}
# Options that open_clip reads only where the tower is timm's, and their defaults.
TIMM_OPTIONS = {
    "timm_pool": "avg",
    "timm_proj": "linear",
    "timm_proj_bias": False,
    "timm_drop": 0.0,
    "timm_drop_path": None,
}
# Options of open_clip's own vision tower, which it does not read where the tower is timm's.
_NOT_TIMM = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "act_kwargs", "norm_kwargs"}
_NOT_TIMM |= {"attentional_pool", "no_ln_pre", "pos_embed_type", "pool_type"}
_TEXT_READ = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "no_causal_mask"}
_TEXT_READ |= {"pool_type", "eos_id", "proj_bias", "act_kwargs", "norm_kwargs", "hf_tokenizer_name", "tokenizer_kwargs"}
_TEXT_FREE = {"pad_id", "output_tokens", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"}
_TEXT_FIXED = TOWER_FIXED | {
    "embed_cls": (False,),
    "proj_type": ("linear",),
    "tokenizer_mode": (None,),
    "hf_model_name": (None,),
}
_MODEL_KEYS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"}
_MODEL_KEYS |= {"init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"}

# Tokens of the vocabulary that open_clip has built in.
OPENAI_VOCABULARY = 49408
_CLIP_CLEAN = {"clean": "lower"}
_SIGLIP_CLEAN = {"clean": "canonicalize"}
# The tokenizer that each SigLIP vocabulary belongs to: English, multilingual, SigLIP 2's.
_SIGLIP_TOKENIZERS = {
    32000: "timm/ViT-B-16-SigLIP",
    250000: "timm/ViT-B-16-SigLIP-i18n-256",
    256000: "timm/ViT-B-16-SigLIP2",
}
_XLM_TOKENIZER = "facebook/xlm-v-base"


def refuse(option: str, value, want: str):
    """Raises a UserError that names an option, its value, and what is implemented."""
    raise UserError(f"open_clip option {option}={brief(value)} is not implemented here: {want}")


def check_options(cfg: Mapping, where: str, read: set[str], free: set[str], fixed: Mapping[str, tuple]) -> None:
    """Raises a UserError where an option is unknown or has a value that our modules do not implement.

    Args:
      cfg: the options.
      where: the config's name in messages.
      read: options that the caller reads.
      free: options of any value.
      fixed: option -> the values that are implemented.
    """
    unknown = sorted(set(cfg) - read - free - set(fixed))
    if unknown:
        raise UserError(f"open_clip config has unknown options in {where}: {listing(unknown)}")
    for key, allowed in fixed.items():
        if key in cfg and cfg[key] not in allowed:
            refuse(f"{where}.{key}", cfg[key], f"it must be {' or '.join(map(repr, allowed))}")


def number(cfg: Mapping, where: str, key: str, default, kind: Callable = int):
    """A positive number; a square image size may come as a pair."""
    value = cfg.get(key, default)
    if (
        key in ("image_size", "patch_size")
        and isinstance(value, list | tuple)
        and value
        and value == value[:1] * len(value)
    ):
        value = value[0]
    if not finite(value) or not 0 < value < 2**31 or kind(value) != value:
        refuse(f"{where}.{key}", value, f"it must be one positive {kind.__name__}")
    return kind(value)


def flag(cfg: Mapping, where: str, key: str) -> bool:
    """An option that is true or false; default false."""
    value = cfg.get(key) or False
    if not isinstance(value, bool):
        refuse(f"{where}.{key}", value, "it must be true or false")
    return value


def _section(cfg: Mapping, where: str, key: str) -> Mapping:
    """An option that holds options; none where it is missing or null."""
    value = cfg.get(key) or {}
    if not isinstance(value, Mapping):
        refuse(f"{where}.{key}", value, "it must be an object of options")
    return value


def activation(cfg: Mapping, where: str, quick_gelu: bool) -> str:
    """Our name of a tower's activation, a key of `layers.ACTIVATIONS`."""
    kwargs = _section(cfg, where, "act_kwargs")
    if quick_gelu and not kwargs:
        return "quick_gelu"
    names = {"none": "gelu", "tanh": "gelu_tanh"}
    if quick_gelu or set(kwargs) - {"approximate"} or kwargs.get("approximate", "none") not in [*names]:
        refuse(f"{where}.act_kwargs", kwargs, 'use {"approximate": "tanh"} without quick_gelu')
    return names[kwargs.get("approximate", "none")]


def norm_eps(cfg: Mapping, where: str) -> float:
    """The epsilon of a tower's norms."""
    kwargs = _section(cfg, where, "norm_kwargs")
    if set(kwargs) - {"eps"} or not finite(kwargs.get("eps", 0)):
        refuse(f"{where}.norm_kwargs", kwargs, "eps, a number, is the one option known")
    return float(kwargs.get("eps", 1e-5))


def check_timm(model_cfg: Mapping, fields: Mapping, **implemented: tuple) -> None:
    """Checks the config of a tower that open_clip makes of a timm model.

    Args:
      model_cfg: open_clip's model config.
      fields: of Spec, as the timm model fixes them.
      **implemented: option of `TIMM_OPTIONS` -> the values that are implemented; default the option's default.

    Raises:
      UserError: an option is unknown or makes another model.
    """
    cfg = model_cfg["vision_cfg"]
    name = cfg["timm_model_name"]
    fixed = {k: (default,) for k, default in TIMM_OPTIONS.items()} | {"timm_drop_path": (None, 0)} | implemented
    free = VISION_FREE | _NOT_TIMM | set(TOWER_FIXED)
    read = {"timm_model_name", "image_size"}
    # An option that is left out has open_clip's default, which may not be implemented.
    check_options(TIMM_OPTIONS | dict(cfg), "vision_cfg", read, free, fixed | {"patch_dropout": (0,)})
    embed_dim = model_cfg.get("embed_dim")
    if embed_dim != fields.get("embed_dim", embed_dim):
        refuse("embed_dim", embed_dim, f"{name} has no projection, so it must be {fields['embed_dim']}")
    size = number(cfg, "vision_cfg", "image_size", 224)
    if size != fields["image_size"]:
        refuse("vision_cfg.image_size", size, f"open_clip builds {name} at {fields['image_size']}")
    if not flag(model_cfg, "model_cfg", "custom_text"):
        refuse("custom_text", False, f"a model of {name} keeps its text tower under `text.`, so it must be true")


def timm_vision(spec: Spec, table: Mapping[str, Mapping], **options) -> dict:
    """The `vision_cfg` of the timm model that is this tower.

    Args:
      spec: of the tower.
      table: timm's models, name -> the fields of Spec that each fixes.
      **options: of the config.

    Raises:
      UserError: none of the models is this tower; says which there are.
    """
    fits = (name for name, fields in table.items() if all(getattr(spec, k) == v for k, v in fields.items()))
    if (name := next(fits, None)) is None:
        raise UserError(
            f"open_clip builds a {spec.arch} tower from timm's list, which has none of width {spec.width}, "
            f"{spec.layers} layers, {spec.heads} heads, mlp_dim {spec.mlp_dim}, patch {spec.patch_size}, "
            f"{spec.image_size} px, {spec.activation}: use one of {listing(list(table))}"
        )
    return dict(image_size=spec.image_size, timm_model_name=name, timm_model_pretrained=False, **options)


def _tokenizer(cfg: Mapping) -> str:
    name, kwargs = cfg.get("hf_tokenizer_name") or "", cfg.get("tokenizer_kwargs") or {}
    if not isinstance(name, str):
        refuse("text_cfg.hf_tokenizer_name", name, "it must be a text")
    if name and kwargs in (_CLIP_CLEAN, _SIGLIP_CLEAN):
        return "clip" if kwargs == _CLIP_CLEAN else "siglip"
    if kwargs:
        refuse("text_cfg.tokenizer_kwargs", kwargs, f"only {_SIGLIP_CLEAN}, with hf_tokenizer_name, is known")
    if "xlm-v" in name.lower():
        return "xlm"
    if name and "clip" not in name.lower():
        refuse("text_cfg.hf_tokenizer_name", name, "the tokenizers known are CLIP's, SigLIP's and XLM-V's")
    return "clip"


def _text(cfg: Mapping, vision_activation: str, quick_gelu: bool) -> TextSpec:
    check_options(cfg, "text_cfg", _TEXT_READ, _TEXT_FREE, _TEXT_FIXED)
    act = activation(cfg, "text_cfg", quick_gelu)
    pool = cfg.get("pool_type", "argmax")
    if pool not in ("argmax", "eos", "last"):
        refuse("text_cfg.pool_type", pool, "it must be 'argmax', 'eos' or 'last'")
    width, heads = number(cfg, "text_cfg", "width", 512), number(cfg, "text_cfg", "heads", 8)
    if width % heads:
        refuse("text_cfg.heads", heads, f"it must divide the width, {width}")
    return TextSpec(
        context_length=number(cfg, "text_cfg", "context_length", 77),
        vocab_size=number(cfg, "text_cfg", "vocab_size", 49408),
        width=width,
        heads=heads,
        layers=number(cfg, "text_cfg", "layers", 12),
        mlp_dim=int(width * number(cfg, "text_cfg", "mlp_ratio", 4.0, float)),
        causal=not flag(cfg, "text_cfg", "no_causal_mask"),
        pool=pool,
        proj_bias=flag(cfg, "text_cfg", "proj_bias"),
        norm_eps=norm_eps(cfg, "text_cfg"),
        tokenizer=_tokenizer(cfg),
        activation="" if act == vision_activation else act,
        eos_id=number(cfg, "text_cfg", "eos_id", 2) if pool == "eos" else 2,
    )


def _channels(cfg: Mapping, key: str, default: tuple) -> tuple[float, ...]:
    """Mean or std, one number per channel; a single number stands for all three."""
    value = cfg.get(key) or default
    value = tuple(value) if isinstance(value, (list, tuple)) else (value,) * 3
    if len(value) != 3 or not all(finite(v) and abs(v) < 1e38 for v in value):
        refuse(f"preprocess_cfg.{key}", cfg[key], "it must be three numbers")
    return tuple(map(float, value))


def _preprocess(config: Mapping, default: dict) -> dict:
    """Mean, std, resize; without a `preprocess_cfg` what all published models of the architecture use."""
    if "preprocess_cfg" not in config:
        return default
    cfg = _section(config, "config", "preprocess_cfg")
    fields = dict(
        mean=_channels(cfg, "mean", OPENAI_MEAN),
        std=_channels(cfg, "std", OPENAI_STD),
        resize_mode=cfg.get("resize_mode") or "shortest",
        interpolation=cfg.get("interpolation") or "bicubic",
    )
    for key, allowed in dict(resize_mode=("shortest", "squash"), interpolation=("bicubic", "bilinear")).items():
        if fields[key] not in allowed:
            refuse(f"preprocess_cfg.{key}", fields[key], f"use {' or '.join(allowed)}")
    return fields


def _architecture(vision_cfg: Mapping) -> str:
    """The architecture whose tower open_clip builds from this config."""
    name = vision_cfg.get("timm_model_name")
    for arch, module in backbones.architectures().items():
        if isinstance(name, str | None) and module.reads_open_clip(vision_cfg):
            return arch
    known = "of timm's models only vit_*_siglip_* and eva02_{base,large}_*_clip_* are"
    return refuse("vision_cfg.timm_model_name", name, known)


def from_open_clip(config: Mapping, *, name: str = "", source: str = "") -> Spec:
    """The `Spec` of an open_clip config; token selection and readout are left at their defaults.

    Args:
      config: parsed `open_clip_config.json` (`model_cfg`, `preprocess_cfg`), or a bare model config as
        open_clip's `model_configs/*.json` are.
      name: open_clip's name of the model, as `Spec.open_clip_name`.
      source: where the weights are, as `Spec.source`.

    Raises:
      UserError: not an open_clip config, or an option that our modules do not implement, named.
    """
    model = config.get("model_cfg", config) if isinstance(config, Mapping) else None
    parts = ("vision_cfg", "text_cfg")
    if not isinstance(model, Mapping) or not all(isinstance(model.get(k), Mapping) for k in parts):
        raise UserError("not an open_clip config: it needs a model_cfg with embed_dim, vision_cfg and text_cfg")
    check_options(model, "model_cfg", _MODEL_KEYS | {"preprocess_cfg"} if model is config else _MODEL_KEYS, set(), {})
    embed_dim = number(model, "model_cfg", "embed_dim", None)
    arch = _architecture(model["vision_cfg"])
    module = backbones.architecture(arch)
    fields = module.from_open_clip(model) | dict(arch=arch, embed_dim=embed_dim)
    return Spec(
        open_clip_name=name,
        source=source,
        text=_text(model["text_cfg"], fields["activation"], flag(model, "model_cfg", "quick_gelu")),
        **fields,
        **_preprocess(config, module.PREPROCESS),
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
        context_length=text.context_length,
        vocab_size=text.vocab_size,
        width=text.width,
        heads=text.heads,
        layers=text.layers,
        mlp_ratio=mlp_ratio(text.width, text.mlp_dim),
        no_causal_mask=not text.causal,
        pool_type=text.pool,
        proj_bias=text.proj_bias,
        **({"eos_id": text.eos_id} if text.pool == "eos" else {}),
        **tower_options(text.activation or spec.activation, text.norm_eps),
    )
    if text.tokenizer == "siglip":
        # From a folder open_clip takes the tokenizer files beside the weights, whatever this name is.
        cfg["hf_tokenizer_name"] = _SIGLIP_TOKENIZERS.get(text.vocab_size, _SIGLIP_TOKENIZERS[32000])
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
        raise UserError(
            f"open_clip has one quick_gelu for both towers: {name} in the text and {spec.activation} in the vision "
            "tower cannot be written"
        )
    return {"quick_gelu": True} if quick else {}


def to_open_clip(spec: Spec) -> dict:
    """The content of `open_clip_config.json` for `spec`: `model_cfg` and `preprocess_cfg`.

    Raises:
      UserError: open_clip cannot build this model: timm has no such tower, or open_clip no such activation.
    """
    tower = backbones.architecture(spec.arch).to_open_clip(spec)
    return dict(
        model_cfg=dict(embed_dim=spec.embed_dim, **tower | _text_activation(spec, tower), text_cfg=_text_cfg(spec)),
        preprocess_cfg=dict(
            size=spec.image_size,
            mode="RGB",
            mean=list(spec.mean),
            std=list(spec.std),
            interpolation=spec.interpolation,
            resize_mode=spec.resize_mode,
        ),
    )
