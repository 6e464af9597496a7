"""Sources whose config is read without the library that wrote them."""

import dataclasses
import functools
import json
import runpy

import mutations
import pytest
import small
from helpers import refused
from places import ROOT
from specs import DINOV2, QUICK

from diva_jax import config as configs
from diva_jax.common import fields
from diva_jax.common.errors import UserError
from diva_jax.models.backbones import Spec, build, spec_of
from diva_jax.models.backbones.shared.text import Text
from diva_jax.models.diffusion.settings import Diffusion
from diva_jax.models.layers import abstract
from diva_jax.weights import hf, readers

# Fields that change no tower.
NOT_BUILT = ("source", "open_clip_name", "mean", "std", "resize_mode", "interpolation", "select", "add_text", "readout")


@functools.cache
def both_towers(spec):
    abstract(lambda rngs: build(spec, rngs=rngs))
    if spec.has_text:
        abstract(lambda rngs: Text(spec, rngs=rngs))


@pytest.mark.parametrize("name", fields.declared(Spec))
def test_a_backbone_that_may_be_trained_can_be_built_and_exported(name):
    """Whatever a field is set to: refused in one sentence before training, or a tower that each library can hold."""
    refused = 0
    for value in [*mutations.WRONG, "nonsense", -3, 7]:
        config = configs.default(QUICK).unlock()
        *section, field = name.split(".")
        with (config.backbone[section[0]] if section else config.backbone).ignore_type() as section:
            section[field] = value
        try:
            configs.validate(config, 1)
        except UserError as e:
            refused += 1
            assert "backbone" in str(e) and "\n" not in str(e)
            continue
        spec = spec_of(config)
        both_towers(dataclasses.replace(spec, **{f: getattr(QUICK, f) for f in NOT_BUILT}))
    assert refused or name in ("source", "open_clip_name")


@pytest.mark.parametrize("option", ["use_mask_token", "qkv_bias"])
def test_dinov2_options_that_are_not_implemented_are_named(option):
    config = hf.to_transformers(DINOV2, "float32") | {option: False}
    refused(f"{option}=false", hf.from_transformers, config, {}, "x")


def test_a_transformers_model_that_is_not_known_lists_those_that_are():
    with pytest.raises(UserError, match="is a 'bert' model: give the folder of a whole .*Dinov2Model.* or SiglipModel"):
        hf.from_transformers({"model_type": "bert"}, {}, "x")


@pytest.mark.parametrize(("vocab", "activation"), [(32000, ""), (256000, "gelu_tanh")], ids=["siglip", "siglip2"])
def test_published_siglip_folders_are_read_as_open_clip_runs_them(vocab, activation):
    """transformers' published configs leave `hidden_act` at its default, tanh, in both towers of both versions."""
    config = dict(model_type="siglip", text_config=dict(vocab_size=vocab), vision_config=dict(image_size=224))
    spec, silent = hf.from_transformers(config, {}, "x")
    assert (spec.activation, spec.text.activation, silent) == ("gelu", activation, {"activation"})
    giant = dict(hidden_size=1536, num_hidden_layers=40, num_attention_heads=16, intermediate_size=6144, image_size=256)
    spec, _ = hf.from_transformers(config | dict(vision_config=giant), {}, "x")
    assert spec.activation == "gelu_tanh" and spec.text.activation == ("gelu" if vocab == 32000 else "")


def test_fingerprint_is_of_contents_and_order(tmp_path):
    for name, content in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (readers.fingerprint([tmp_path / n]) for n in "abc")
    assert a == c != b and len(a) == 64
    assert readers.fingerprint([tmp_path / "a", tmp_path / "b"]) != readers.fingerprint(
        [tmp_path / "b", tmp_path / "a"]
    )


def test_a_custom_config_takes_the_diffusion_model_from_its_folder(tmp_path):
    sd = small.diffusion()
    for part, options in sd.items():
        (tmp_path / part).mkdir()
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        (tmp_path / part / name).write_text(json.dumps(options | {"_diffusers_version": "0.35", "revision": None}))
    get_config = runpy.run_path(str(ROOT / "configs/custom.py"))["get_config"]
    config = get_config(f"ViT-B-32,{tmp_path}")
    configs.validate(config, 1)
    assert config.diffusion.source == str(tmp_path) and config.backbone.patch_size == 32
    want = configs.default("vitl14", sd).diffusion
    want.source = str(tmp_path)
    assert Diffusion.from_dict(config.diffusion.to_dict()) == Diffusion.from_dict(want.to_dict())
    (tmp_path / "vae/config.json").unlink()
    refused("vae/config.json is missing", get_config, f"ViT-B-32,{tmp_path}")
