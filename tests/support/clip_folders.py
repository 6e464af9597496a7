"""Folders of small transformers models with random weights."""

from helpers import randomise
from specs import CLIP_FOLDER as CLIP
from specs import DINOV2, METACLIP2_FOLDER
from specs import SIGLIP_FOLDER as SIGLIP

from diva_jax.weights import hf


def siglip_folder(folder, spec=SIGLIP, act=None, **save):
    """Writes and returns a transformers SiglipModel; `act` is its activation of both towers, else the spec's."""
    from transformers import SiglipConfig, SiglipModel

    cfg = hf.to_transformers(spec, "float32")
    if act is not None:
        for part in ("vision_config", "text_config"):
            cfg[part]["hidden_act"] = act
    config = SiglipConfig(vision_config=cfg["vision_config"], text_config=cfg["text_config"])
    model = randomise(SiglipModel(config))
    model.save_pretrained(folder, **save)
    return model


def _clip_like(kind, config_kind, folder, spec, **save):
    cfg = hf.to_transformers(spec, "float32")
    parts = {k: cfg[k] for k in ("vision_config", "text_config", "projection_dim")}
    model = randomise(kind(config_kind(**parts)))
    model.save_pretrained(folder, **save)
    return model


def clip_folder(folder, spec=CLIP, **save):
    """Writes and returns a transformers CLIPModel."""
    from transformers import CLIPConfig, CLIPModel

    return _clip_like(CLIPModel, CLIPConfig, folder, spec, **save)


def metaclip2_folder(folder, spec=METACLIP2_FOLDER, **save):
    """Writes and returns a transformers MetaClip2Model."""
    from transformers import MetaClip2Config, MetaClip2Model

    return _clip_like(MetaClip2Model, MetaClip2Config, folder, spec, **save)


def dinov2_folder(folder, spec=DINOV2, **save):
    """Writes and returns a transformers Dinov2Model or Dinov2WithRegistersModel."""
    import transformers

    cfg = hf.to_transformers(spec, "float32")
    (kind,) = cfg.pop("architectures")
    config = getattr(transformers, kind.replace("Model", "Config"))(**cfg)
    model = randomise(getattr(transformers, kind)(config))
    model.save_pretrained(folder, **save)
    return model
