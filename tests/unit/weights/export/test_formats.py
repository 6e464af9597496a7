"""Configs of exported models, without the libraries that load them."""

import dataclasses

import numpy as np
import pytest
from specs import CLIP_FOLDER as CLIP
from specs import TRAINED

from diva_jax import demo
from diva_jax.common.errors import UserError
from diva_jax.models.backbones import TABLE
from diva_jax.models.backbones.shared.open_clip_config import from_open_clip, to_open_clip
from diva_jax.weights import hf, origins, tensors
from diva_jax.weights.export import cards, layouts


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


@pytest.mark.attack
@pytest.mark.parametrize("seed", range(3))
def test_weights_that_are_not_finite_are_named(tmp_path, seed):
    """And not said to be read back differently, since NaN is not equal to itself."""
    rng = np.random.default_rng(seed)
    demo.write_clip(tmp_path / "clip", TRAINED)
    source = origins.open_source(str(tmp_path / "clip"))
    name = sorted(source.tensors)[rng.integers(len(source.tensors))]
    array = np.array(source.tensors[name])
    array.flat[rng.integers(array.size)] = rng.choice([np.nan, np.inf, -np.inf])
    changed = tensors.Tensor(array.shape, array.dtype, lambda: array)
    broken = dataclasses.replace(source, tensors=tensors.Tensors({**source.tensors, name: changed}, source.files))
    for fmt in ("open_clip", "hf"):
        with pytest.raises(UserError, match=rf"clip: the tensor {name} has values that are NaN or infinite"):
            layouts.export(broken, source.spec, tmp_path / fmt, fmt, run=False)
    assert [p.name for p in tmp_path.iterdir()] == ["clip"]


@pytest.mark.attack
def test_a_card_has_no_secrets():
    spec = dataclasses.replace(TRAINED, source="clip")
    config = {
        "objective": "diva",
        "data": {"path": "https://me:pw1@host/{0..9}.tar?token=pw2"},
        "batch_size": 1,
        "seed": 0,
    }
    run = dict(workdir="w", step=1, config=config, sources={}, base="b", tuned=["vision"])
    source = origins.ClipSource("w", "checkpoint", tensors.Tensors({}, []), spec, run=run)
    text = cards.card(source, spec, "hf", "float32")
    assert "https://host/{0..9}.tar?..." in text and "pw1" not in text and "pw2" not in text
