"""Folders of small transformers models with random weights."""

from helpers import randomise
from specs import CLIP_FOLDER as CLIP

from diva_jax.weights import hf


def transformers_folder(folder, spec=CLIP, **save):
    """Writes and returns the model of transformers that a spec describes; `save` as for `save_pretrained`."""
    import transformers

    config = hf.to_transformers(spec, "float32")
    (kind,) = config.pop("architectures")
    if spec.has_text:
        config = {k: v for k, v in config.items() if k in ("vision_config", "text_config", "projection_dim")}
    model = getattr(transformers, kind)(getattr(transformers, kind.replace("Model", "Config"))(**config))
    randomise(model).save_pretrained(folder, **save)
    return model
