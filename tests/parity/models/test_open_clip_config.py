"""Specs from open_clip's configs describe the models that open_clip builds, with all names."""

import copy
import dataclasses
import functools
import json
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from flax import nnx
from helpers import refused
from ml_collections import ConfigDict
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from places import TESTS
from small import with_fields

from diva_jax.models.backbones import HALF, OPENAI_MEAN, TABLE, Spec, TextSpec, build, eva02, siglip, vit
from diva_jax.models.backbones.shared import open_clip_config as occ
from diva_jax.models.backbones.shared.open_clip_config import from_open_clip, to_open_clip
from diva_jax.models.backbones.shared.transformer import Text
from diva_jax.models.layers import Keys
from diva_jax.weights import names
from diva_jax.weights.names import flat, torch_shape

# One open_clip model for each way in which configs differ; the others are read by `make slow`.
NAMES = ("ViT-H-14-378-quickgelu", "ViT-bigG-14", "ViT-B-16-SigLIP", "ViT-B-16-SigLIP2", "EVA02-B-16")
NAMES += ("ViT-H-14-worldwide-quickgelu",)
MORE_NAMES = ("ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "ViT-g-14")
MORE_NAMES += ("EVA02-L-14", "EVA02-L-14-336", "ViT-SO400M-16-SigLIP2-256")
MORE_NAMES += ("ViT-SO400M-14-SigLIP", "ViT-SO400M-14-SigLIP-384")
SIZES = ("image_size", "patch_size", "width", "layers", "heads", "mlp_dim", "embed_dim")
ARCHITECTURE = ("arch", *SIZES, "activation", "norm_eps", "mean", "std", "text")


@functools.cache
def our_shapes(spec: Spec) -> dict[str, tuple]:
    found = {}
    for table, tower in ((names.table("vision", spec), build), (names.table("text", spec), Text)):
        leaves = flat(nnx.eval_shape(lambda tower=tower: tower(spec, rngs=Keys(0))))
        found |= {table.torch_name(p): torch_shape(p, v.shape) for p, v in leaves.items()}
    return found


def same_towers(spec: Spec, config: dict):
    config, ours = copy.deepcopy(config), our_shapes(spec)
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    with torch.device("meta"):
        theirs = {k: tuple(v.shape) for k, v in kind(**config).state_dict().items()}
    assert set(theirs) - set(ours) == {"logit_scale"} | ({"logit_bias"} if spec.arch == "siglip" else set())
    assert {k: v for k, v in theirs.items() if k in ours} == ours
    for tower in ("vision", "text"):
        assert all(n in ours or names.table(tower, spec).ignored(n) for n in theirs)


def small(**kw) -> dict:
    """A small model config; `kw` as `vision_cfg__width=...` or `quick_gelu=...`."""
    vision = dict(image_size=28, patch_size=7, width=48, layers=2, head_width=16)
    text = dict(context_length=9, vocab_size=99, width=36, heads=3, layers=2)
    return with_fields(ConfigDict(dict(embed_dim=24, vision_cfg=vision, text_cfg=text), type_safe=False), kw).to_dict()


@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE_NAMES)])
def test_names_and_shapes_are_those_of_the_model_that_open_clip_builds(name):
    config = open_clip.get_model_config(name)
    spec = from_open_clip(config, name=name)
    same_towers(spec, config)
    written = to_open_clip(spec)
    assert from_open_clip(written, name=name) == spec
    same_towers(spec, written["model_cfg"])


@pytest.mark.parametrize("tag", TABLE)
def test_table_rows_are_what_open_clip_names_and_come_back_from_their_export(tag):
    row = TABLE[tag]
    spec = from_open_clip(open_clip.get_model_config(row.open_clip_name), name=row.open_clip_name)
    assert {k: getattr(row, k) for k in ARCHITECTURE} == {k: getattr(spec, k) for k in ARCHITECTURE}
    config = json.loads(json.dumps(to_open_clip(row)))
    spec = from_open_clip(config, name=row.open_clip_name, source=row.source)
    assert spec == dataclasses.replace(row, select=spec.select, add_text=spec.add_text, readout=spec.readout)
    assert config["model_cfg"].get("quick_gelu", False) == ("quickgelu" in row.open_clip_name)
    assert config["preprocess_cfg"]["resize_mode"] == row.resize_mode


def test_defaults_are_those_of_open_clip():
    spec = from_open_clip(dict(embed_dim=512, vision_cfg={}, text_cfg={}))
    vision, text = CLIPVisionCfg(), CLIPTextCfg()
    assert (spec.layers, spec.width, spec.image_size) == (vision.layers, vision.width, vision.image_size)
    assert (spec.patch_size, spec.width // spec.heads) == (vision.patch_size, vision.head_width)
    assert spec.mlp_dim == vision.width * vision.mlp_ratio and spec.activation == "gelu"
    assert spec.text == TextSpec(text.context_length, text.vocab_size, text.width, text.heads, text.layers, 2048)
    assert (spec.mean, spec.resize_mode) == (OPENAI_MEAN, "shortest")
    same_towers(spec, dict(embed_dim=512, vision_cfg={}, text_cfg={}))
    # Every option is known.
    vision, text = dataclasses.asdict(vision), dataclasses.asdict(text)
    assert from_open_clip(dict(embed_dim=512, vision_cfg=vision, text_cfg=text)) == spec


@pytest.mark.parametrize("name", [*siglip.CHECKPOINT.timm, *eva02.CHECKPOINT.timm])
def test_timm_table(name):
    with torch.device("meta"):
        of_eva02 = name in eva02.CHECKPOINT.timm
        options = dict(num_classes=24, global_pool="token") if of_eva02 else dict(num_classes=0, global_pool="map")
        trunk = timm.create_model(name, **options)
    block, sizes = trunk.blocks[0], trunk.patch_embed
    activation = str(block.mlp.act).lower()
    activation = "silu" if "silu" in activation else "gelu_tanh" if "tanh" in activation else "gelu"
    theirs = dict(image_size=sizes.img_size[0], patch_size=sizes.patch_size[0], width=trunk.embed_dim)
    theirs |= dict(layers=len(trunk.blocks), heads=block.attn.num_heads, norm_eps=block.norm1.eps)
    theirs |= dict(activation=activation)
    if of_eva02:
        assert eva02.CHECKPOINT.timm[name] == theirs | dict(mlp_dim=block.mlp.fc1_g.out_features)
        assert (trunk.rope.ref_feat_shape, trunk.rope.temperature) == ((16, 16), 10000)
        return
    fields, pool = siglip.CHECKPOINT.timm[name], trunk.attn_pool
    assert fields == theirs | dict(mlp_dim=block.mlp.fc1.out_features, embed_dim=trunk.num_features)
    pooled = (pool.num_heads, pool.norm.eps, pool.mlp.fc1.out_features)
    assert pooled == (fields["heads"], fields["norm_eps"], fields["mlp_dim"])
    assert type(pool.mlp.act) is type(block.mlp.act)


# Options of `small`, the field that they set, and its value.
OPTIONS = json.loads(Path(__file__).with_name("options.json").read_text())


@pytest.mark.parametrize("options, field, value", OPTIONS)
def test_options_that_are_read_come_back(options, field, value):
    spec = from_open_clip(small(**options))
    assert getattr(spec, field) == value and from_open_clip(to_open_clip(spec)) == spec
    same_towers(spec, to_open_clip(spec)["model_cfg"])


REFUSED = json.loads((TESTS / "parity/refused.json").read_text())
REFUSED["small"] += [[f"vision_cfg__{option}", "another"] for option in vit._FIXED]
REFUSED["small"] += [[f"text_cfg__{option}", "another"] for option in occ._TEXT_FIXED]


@pytest.mark.parametrize("name", ["small", "ViT-B-16-SigLIP", "EVA02-B-16"])
def test_what_is_not_implemented_is_named(name):
    """Options that make another model; where they are left out, open_clip's own default may do so too."""
    for option, value in REFUSED[name]:
        config = small() if name == "small" else open_clip.get_model_config(name)
        *tower, key = option.split("__")
        section = config[tower[0]] if tower else config
        section[key] = value
        if value == "<left out>":
            del section[key]
        refused(key, from_open_clip, config)


def test_other_files_and_other_preprocessing_are_refused():
    for config in (None, [], {}, {"model_cfg": {}}, {"embed_dim": 3, "vision_cfg": {}}):
        refused("open_clip's config cannot be used", from_open_clip, config)
    for key, value in (("resize_mode", "longest"), ("interpolation", "random"), ("mean", [0.5, 0.5])):
        refused(f"preprocess_cfg.{key}", from_open_clip, dict(model_cfg=small(), preprocess_cfg={key: value}))


def test_preprocessing_left_out_is_open_clips_default_except_for_siglip():
    config = open_clip.get_model_config("ViT-B-16-SigLIP")
    assert from_open_clip(config).mean == HALF and from_open_clip(config).resize_mode == "squash"
    named = from_open_clip(dict(model_cfg=config, preprocess_cfg={"std": [0.1, 0.2, 0.3]}))
    assert (named.mean, named.std, named.resize_mode) == (OPENAI_MEAN, (0.1, 0.2, 0.3), "shortest")


TWO = from_open_clip(small(text_cfg__act_kwargs={"approximate": "tanh"}))


@pytest.mark.parametrize("row, changes, message", REFUSED["to_open_clip"])
def test_what_open_clip_has_not_cannot_be_written(row, changes, message):
    spec = dict(so400m=TABLE["siglip_so400m"], default=Spec(), two=TWO)[row]
    refused(message, lambda: to_open_clip(dataclasses.replace(spec, **changes)))
    assert (TWO.activation, TWO.text.activation) == ("gelu", "gelu_tanh")
