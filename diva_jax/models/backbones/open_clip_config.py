"""Two-way between our `Spec` and open_clip's `open_clip_config.json`.

Defaults and the meaning of every option are those of open_clip's `CLIPVisionCfg` and `CLIPTextCfg`. An option
that our modules do not implement is an error that names it, never a model that is silently another.
"""

import re
from collections.abc import Callable, Mapping

from diva_jax.common.errors import UserError, listing
from diva_jax.models.backbones import HALF, OPENAI_MEAN, OPENAI_STD, Spec, TextSpec

# The SigLIP towers that timm has, and their activation; sizes follow from the name.
_TIMM = {
    "vit_base_patch32_siglip_256": "gelu_tanh",
    "vit_base_patch16_siglip_224": "gelu",
    "vit_base_patch16_siglip_256": "gelu",
    "vit_base_patch16_siglip_384": "gelu",
    "vit_base_patch16_siglip_512": "gelu",
    "vit_large_patch16_siglip_256": "gelu",
    "vit_large_patch16_siglip_384": "gelu",
    "vit_large_patch16_siglip_512": "gelu_tanh",
    "vit_so400m_patch14_siglip_224": "gelu",
    "vit_so400m_patch14_siglip_378": "gelu",
    "vit_so400m_patch14_siglip_384": "gelu",
    "vit_so400m_patch16_siglip_256": "gelu_tanh",
    "vit_so400m_patch16_siglip_384": "gelu_tanh",
    "vit_so400m_patch16_siglip_512": "gelu_tanh",
    "vit_giantopt_patch16_siglip_256": "gelu_tanh",
    "vit_giantopt_patch16_siglip_384": "gelu_tanh",
}
_TIMM_SIZES = {  # width, layers, heads, mlp_dim
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "giantopt": (1536, 40, 16, 6144),
}
# The tokenizer that each SigLIP vocabulary belongs to: English, multilingual, SigLIP 2's.
_SIGLIP_TOKENIZERS = {
    32000: "timm/ViT-B-16-SigLIP",
    250000: "timm/ViT-B-16-SigLIP-i18n-256",
    256000: "timm/ViT-B-16-SigLIP2",
}

# Options that are read, that change no value of ours, and that must be as given (None: or absent).
_TOWER_FIXED = {
    "ls_init_value": (None,),
    "block_type": (None, "default"),
    **dict.fromkeys(
        ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), (False,)
    ),
    "final_ln_after_pool": (False,),
}
_VISION_READ = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "act_kwargs"}
_VISION_READ |= {"norm_kwargs", "timm_model_name"}
_VISION_FREE = {"attn_pooler_queries", "attn_pooler_heads", "output_tokens", "timm_model_pretrained"}
_VISION_FIXED = _TOWER_FIXED | {
    "patch_dropout": (0,),
    "attentional_pool": (False,),
    "no_ln_pre": (False,),
    "pos_embed_type": ("learnable",),
    "pool_type": ("tok",),
}
# Read by open_clip only where the tower is timm's.
_VISION_TIMM = {
    "timm_pool": ("map",),
    "timm_proj": ("none",),
    "timm_proj_bias": (False, True),
    "timm_drop": (0,),
    "timm_drop_path": (None, 0),
}
_TEXT_READ = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "no_causal_mask"}
_TEXT_READ |= {"pool_type", "proj_bias", "act_kwargs", "norm_kwargs", "hf_tokenizer_name", "tokenizer_kwargs"}
_TEXT_FREE = {"pad_id", "eos_id", "output_tokens", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"}
_TEXT_FIXED = _TOWER_FIXED | {
    "embed_cls": (False,),
    "proj_type": ("linear",),
    "tokenizer_mode": (None,),
    "hf_model_name": (None,),
}
_MODEL_KEYS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"}
_MODEL_KEYS |= {"init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"}

_SIGLIP_LOGIT_BIAS = -10
_SIGLIP_CLEAN = {"clean": "canonicalize"}


def _refuse(option: str, value, want: str):
    raise UserError(f"open_clip option {option}={value!r} is not implemented here: {want}")


def _check(cfg: Mapping, where: str, read: set[str], free: set[str], fixed: Mapping[str, tuple]):
    """Raises where an option is unknown or has a value that our modules do not implement."""
    unknown = sorted(set(cfg) - read - free - set(fixed))
    if unknown:
        raise UserError(f"open_clip config has unknown options in {where}: {listing(unknown)}")
    for key, allowed in fixed.items():
        if key in cfg and cfg[key] not in allowed:
            _refuse(f"{where}.{key}", cfg[key], f"it must be {' or '.join(map(repr, allowed))}")


def _number(cfg: Mapping, where: str, key: str, default, kind: Callable = int):
    """A positive number; a square image size may come as a pair."""
    value = cfg.get(key, default)
    if key in ("image_size", "patch_size") and isinstance(value, (list, tuple)) and len(set(value)) == 1:
        value = value[0]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or value <= 0 or kind(value) != value:
        _refuse(f"{where}.{key}", value, f"it must be one positive {kind.__name__}")
    return kind(value)


def _activation(cfg: Mapping, where: str, quick_gelu: bool) -> str:
    kwargs = cfg.get("act_kwargs") or {}
    if quick_gelu and not kwargs:
        return "quick_gelu"
    names = {"none": "gelu", "tanh": "gelu_tanh"}
    if quick_gelu or set(kwargs) - {"approximate"} or kwargs.get("approximate", "none") not in names:
        _refuse(f"{where}.act_kwargs", kwargs, 'use {"approximate": "tanh"} without quick_gelu')
    return names[kwargs.get("approximate", "none")]


def _norm_eps(cfg: Mapping, where: str) -> float:
    kwargs = cfg.get("norm_kwargs") or {}
    if set(kwargs) - {"eps"}:
        _refuse(f"{where}.norm_kwargs", kwargs, "eps is the one option known")
    return float(kwargs.get("eps", 1e-5))


def _timm_fields(name: str) -> dict:
    """The fields of `Spec` that a timm SigLIP model fixes."""
    family, patch, size = re.fullmatch(r"vit_(\w+)_patch(\d+)_siglip_(\d+)", name).groups()
    width, layers, heads, mlp_dim = _TIMM_SIZES[family]
    return dict(
        image_size=int(size),
        patch_size=int(patch),
        width=width,
        layers=layers,
        heads=heads,
        mlp_dim=mlp_dim,
        activation=_TIMM[name],
        norm_eps=1e-6,
    )


def _timm_vision(cfg: Mapping, embed_dim: int) -> dict:
    name = cfg["timm_model_name"]
    if name not in _TIMM:
        _refuse("vision_cfg.timm_model_name", name, "of timm's models only vit_*_siglip_* are")
    # open_clip's own defaults, a linear projection on mean-pooled tokens, are not what is implemented.
    _check(
        {"timm_pool": "avg", "timm_proj": "linear", **cfg},
        "vision_cfg",
        _VISION_READ,
        _VISION_FREE | set(_VISION_FIXED),
        _VISION_TIMM | {"patch_dropout": (0,)},
    )
    fields = _timm_fields(name)
    if embed_dim != fields["width"]:
        _refuse("embed_dim", embed_dim, f"{name} has no projection, so it must be {fields['width']}")
    size = _number(cfg, "vision_cfg", "image_size", 224)
    if size != fields["image_size"]:
        _refuse("vision_cfg.image_size", size, f"open_clip builds {name} at {fields['image_size']}")
    return dict(arch="siglip", **fields)


def _clip_vision(cfg: Mapping, quick_gelu: bool) -> dict:
    _check(cfg, "vision_cfg", _VISION_READ, _VISION_FREE | set(_VISION_TIMM), _VISION_FIXED)
    if isinstance(cfg.get("layers"), (list, tuple)):
        _refuse("vision_cfg.layers", cfg["layers"], "a list of layers means a ResNet, use a ViT")
    width = _number(cfg, "vision_cfg", "width", 768)
    head_width = _number(cfg, "vision_cfg", "head_width", 64)
    if width % head_width:
        _refuse("vision_cfg.head_width", head_width, f"it must divide the width, {width}")
    return dict(
        arch="vit",
        image_size=_number(cfg, "vision_cfg", "image_size", 224),
        patch_size=_number(cfg, "vision_cfg", "patch_size", 16),
        width=width,
        layers=_number(cfg, "vision_cfg", "layers", 12),
        heads=width // head_width,
        mlp_dim=int(width * _number(cfg, "vision_cfg", "mlp_ratio", 4.0, float)),
        activation=_activation(cfg, "vision_cfg", quick_gelu),
        norm_eps=_norm_eps(cfg, "vision_cfg"),
    )


def _tokenizer(cfg: Mapping) -> str:
    name, kwargs = cfg.get("hf_tokenizer_name") or "", cfg.get("tokenizer_kwargs") or {}
    if name and kwargs == _SIGLIP_CLEAN:
        return "siglip"
    if kwargs:
        _refuse("text_cfg.tokenizer_kwargs", kwargs, f"only {_SIGLIP_CLEAN}, with hf_tokenizer_name, is known")
    if name and "clip" not in name.lower():
        _refuse("text_cfg.hf_tokenizer_name", name, "the tokenizers known are CLIP's and SigLIP's")
    return "clip"


def _text(cfg: Mapping, activation: str, quick_gelu: bool) -> TextSpec:
    _check(cfg, "text_cfg", _TEXT_READ, _TEXT_FREE, _TEXT_FIXED)
    if (act := _activation(cfg, "text_cfg", quick_gelu)) != activation:
        raise UserError(
            f"open_clip config gives the text tower {act} and the vision tower {activation} (text_cfg.act_kwargs): "
            "one activation for both is what is implemented here"
        )
    pool = cfg.get("pool_type", "argmax")
    if pool not in ("argmax", "last"):
        _refuse("text_cfg.pool_type", pool, "it must be 'argmax' or 'last'")
    width, heads = _number(cfg, "text_cfg", "width", 512), _number(cfg, "text_cfg", "heads", 8)
    if width % heads:
        _refuse("text_cfg.heads", heads, f"it must divide the width, {width}")
    return TextSpec(
        context_length=_number(cfg, "text_cfg", "context_length", 77),
        vocab_size=_number(cfg, "text_cfg", "vocab_size", 49408),
        width=width,
        heads=heads,
        layers=_number(cfg, "text_cfg", "layers", 12),
        mlp_dim=int(width * _number(cfg, "text_cfg", "mlp_ratio", 4.0, float)),
        causal=not cfg.get("no_causal_mask", False),
        pool=pool,
        proj_bias=bool(cfg.get("proj_bias", False)),
        norm_eps=_norm_eps(cfg, "text_cfg"),
        tokenizer=_tokenizer(cfg),
    )


def _channels(cfg: Mapping, key: str, default: tuple) -> tuple[float, ...]:
    """Mean or std, one number a channel; one number alone stands for all three."""
    value = cfg.get(key) or default
    value = tuple(value) if isinstance(value, (list, tuple)) else (value,) * 3
    if len(value) != 3 or not all(isinstance(v, (int, float)) for v in value):
        _refuse(f"preprocess_cfg.{key}", cfg[key], "it must be three numbers")
    return tuple(map(float, value))


def _preprocess(config: Mapping, arch: str) -> dict:
    """Mean, std, resize; without a `preprocess_cfg` what all published models of the architecture use."""
    if "preprocess_cfg" not in config and arch == "siglip":
        return dict(mean=HALF, std=HALF, resize_mode="squash", interpolation="bicubic")
    cfg = config.get("preprocess_cfg") or {}
    fields = dict(
        mean=_channels(cfg, "mean", OPENAI_MEAN),
        std=_channels(cfg, "std", OPENAI_STD),
        resize_mode=cfg.get("resize_mode") or "shortest",
        interpolation=cfg.get("interpolation") or "bicubic",
    )
    for key, allowed in dict(resize_mode=("shortest", "squash"), interpolation=("bicubic", "bilinear")).items():
        if fields[key] not in allowed:
            _refuse(f"preprocess_cfg.{key}", fields[key], f"use {' or '.join(allowed)}")
    return fields


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
    _check(model, "model_cfg", _MODEL_KEYS | {"preprocess_cfg"} if model is config else _MODEL_KEYS, set(), {})
    vision, text, quick_gelu = model["vision_cfg"], model["text_cfg"], bool(model.get("quick_gelu", False))
    embed_dim = _number(model, "model_cfg", "embed_dim", None)
    timm = bool(vision.get("timm_model_name"))
    fields = _timm_vision(vision, embed_dim) if timm else _clip_vision(vision, quick_gelu)
    if not timm and model.get("init_logit_bias") is not None:
        _refuse("init_logit_bias", model["init_logit_bias"], "only SigLIP models have a bias on their logits")
    if timm and not model.get("custom_text", False):
        _refuse("custom_text", False, "a SigLIP model keeps its text tower apart, so it must be true")
    return Spec(
        open_clip_name=name,
        source=source,
        embed_dim=embed_dim,
        text=_text(text, fields["activation"], quick_gelu),
        **fields,
        **_preprocess(config, fields["arch"]),
    )


def _mlp_ratio(width: int, mlp_dim: int) -> float:
    """A ratio from which open_clip's `int(width * ratio)` gives exactly `mlp_dim`."""
    ratio = mlp_dim / width
    return ratio if int(width * ratio) == mlp_dim else (mlp_dim + 0.5) / width


def _tower_options(activation: str, norm_eps: float) -> dict:
    options = {} if norm_eps == 1e-5 else {"norm_kwargs": {"eps": norm_eps}}
    return options | ({"act_kwargs": {"approximate": "tanh"}} if activation == "gelu_tanh" else {})


def _text_cfg(spec: Spec) -> dict:
    text = spec.text
    cfg = dict(
        context_length=text.context_length,
        vocab_size=text.vocab_size,
        width=text.width,
        heads=text.heads,
        layers=text.layers,
        mlp_ratio=_mlp_ratio(text.width, text.mlp_dim),
        no_causal_mask=not text.causal,
        pool_type=text.pool,
        proj_bias=text.proj_bias,
        **_tower_options(spec.activation, text.norm_eps),
    )
    if text.tokenizer == "siglip":
        # Beside the weights in a folder open_clip takes the tokenizer files from there, whatever this name.
        cfg["hf_tokenizer_name"] = _SIGLIP_TOKENIZERS.get(text.vocab_size, _SIGLIP_TOKENIZERS[32000])
        cfg["tokenizer_kwargs"] = dict(_SIGLIP_CLEAN)
    return cfg


def _siglip_model(spec: Spec) -> dict:
    def fits(name: str) -> bool:
        fields = _timm_fields(name) | {"embed_dim": spec.width}
        return all(getattr(spec, k) == v for k, v in fields.items())

    name = next(filter(fits, _TIMM), None)
    if name is None:
        raise UserError(
            f"open_clip builds a SigLIP tower from timm's list, which has none of width {spec.width}, {spec.layers} "
            f"layers, {spec.heads} heads, mlp_dim {spec.mlp_dim}, patch {spec.patch_size}, {spec.image_size} px, "
            f"{spec.activation}: use one of {listing(list(_TIMM))}"
        )
    vision = dict(
        image_size=spec.image_size,
        timm_model_name=name,
        timm_model_pretrained=False,
        timm_pool="map",
        timm_proj="none",
    )
    return dict(init_logit_bias=_SIGLIP_LOGIT_BIAS, custom_text=True, vision_cfg=vision)


def _clip_model(spec: Spec) -> dict:
    if spec.activation not in ("quick_gelu", "gelu", "gelu_tanh"):
        raise UserError(f"open_clip has no activation={spec.activation!r}: use quick_gelu, gelu or gelu_tanh")
    if spec.width % spec.heads:
        raise UserError(f"heads={spec.heads} must divide width={spec.width}")
    vision = dict(
        image_size=spec.image_size,
        layers=spec.layers,
        width=spec.width,
        head_width=spec.width // spec.heads,
        mlp_ratio=_mlp_ratio(spec.width, spec.mlp_dim),
        patch_size=spec.patch_size,
        **_tower_options(spec.activation, spec.norm_eps),
    )
    return dict(quick_gelu=spec.activation == "quick_gelu", vision_cfg=vision)


def to_open_clip(spec: Spec) -> dict:
    """The content of `open_clip_config.json` for `spec`: `model_cfg` and `preprocess_cfg`.

    Raises:
      UserError: open_clip cannot build this model: a SigLIP tower that timm has not, an activation it lacks.
    """
    tower = _siglip_model(spec) if spec.arch == "siglip" else _clip_model(spec)
    return dict(
        model_cfg=dict(embed_dim=spec.embed_dim, **tower, text_cfg=_text_cfg(spec)),
        preprocess_cfg=dict(
            size=spec.image_size,
            mode="RGB",
            mean=list(spec.mean),
            std=list(spec.std),
            interpolation=spec.interpolation,
            resize_mode=spec.resize_mode,
        ),
    )
