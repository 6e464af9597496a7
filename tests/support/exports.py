"""Models that open_clip writes, and the comparison of their tensors."""

import numpy as np
import open_clip
from helpers import randomise, tensors

from diva_jax.models.backbones.shared.open_clip_config import to_open_clip
from diva_jax.weights.export import reference


def equal(ours, theirs):
    """Asserts that two mappings contain the same tensors, bit-identical."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(np.asarray(ours[name]), np.asarray(theirs[name]), err_msg=name)


def written_by_open_clip(spec, folder):
    """Writes a random CLIP of `spec` as open_clip does; returns its tensors."""
    folder.mkdir()
    model = randomise(open_clip.CLIP(**to_open_clip(spec)["model_cfg"]))
    reference.save_open_clip(model, spec, folder)
    return tensors(model)
