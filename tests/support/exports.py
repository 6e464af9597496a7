"""Models that open_clip writes, and the comparison of their tensors."""

import numpy as np
import open_clip
from helpers import randomise, tensors
from open_clip.push_to_hf_hub import save_config_for_hf
from safetensors.torch import save_file

from diva_jax.models.backbones.shared.open_clip_config import to_open_clip


def equal(ours, theirs):
    """Asserts that two mappings contain the same tensors, bit-identical."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(np.asarray(ours[name]), np.asarray(theirs[name]), err_msg=name)


def written_by_open_clip(spec, folder):
    """Writes a random CLIP of `spec` as open_clip does; returns its tensors."""
    folder.mkdir()
    model = randomise(open_clip.CLIP(**to_open_clip(spec)["model_cfg"]))
    save_open_clip(model, spec, folder)
    return tensors(model)


def save_open_clip(model, spec, folder):
    """Writes a model of `spec` as open_clip does, but for the file of weights, which is safetensors'."""
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    open_clip.model.set_model_preprocess_cfg(model, to_open_clip(spec)["preprocess_cfg"])
    save_config_for_hf(model, folder / "open_clip_config.json", to_open_clip(spec)["model_cfg"])
