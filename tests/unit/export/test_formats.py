"""Configs of exported models, without the libraries that load them."""

import dataclasses

import pytest
from specs import CLIP_FOLDER as CLIP

from diva_jax.common.errors import UserError
from diva_jax.models.backbones import TABLE
from diva_jax.models.backbones.shared.open_clip_config import from_open_clip, to_open_clip
from diva_jax.weights import hf


def test_transformers_cannot_hold_every_text_tower():
    text = dataclasses.replace(CLIP.text, causal=False)
    with pytest.raises(UserError, match="use --format=open_clip"):
        hf.to_transformers(dataclasses.replace(CLIP, text=text), "float32")


@pytest.mark.parametrize("tag", list(TABLE))
def test_every_backbone_has_both_configs(tag):
    """The configs of an export describe what was exported."""

    def comparable(spec):
        return dataclasses.replace(
            spec, source="", open_clip_name="", **dict.fromkeys(("select", "add_text", "readout"), "")
        )

    spec = TABLE[tag]
    assert comparable(from_open_clip(to_open_clip(spec))) == comparable(spec)
    found, silent = hf.from_transformers(hf.to_transformers(spec, "float32"), hf.image_processor(spec), tag)
    assert comparable(found) == comparable(spec) and not silent
