"""Sources that cannot be used, configs read without their library, longer texts, and files that are written."""

import dataclasses
import functools
import json
import runpy

import jax
import jax.numpy as jnp
import mutations
import numpy as np
import pytest
import small
import trees
from flax import nnx
from helpers import refused
from jax.sharding import NamedSharding, PartitionSpec
from places import ROOT
from specs import DINOV2, QUICK

from diva_jax import config as configs, weights
from diva_jax.common import fields
from diva_jax.common.errors import UserError
from diva_jax.models.backbones import Spec, build, spec_of
from diva_jax.models.backbones.shared.transformer import Text
from diva_jax.models.diffusion.presets import Diffusion
from diva_jax.models.layers import abstract
from diva_jax.weights import formats, names, origins


def test_missing_shards_and_the_fingerprint_of_contents_and_order(tmp_path):
    index = {"weight_map": {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}}
    trees.change(tmp_path, {"m.safetensors.index.json": json.dumps(index), "a": "1", "b": "2", "c": "1", "t.pth": ""})
    formats.write_safetensors(tmp_path / "m-00001-of-00002.safetensors", {"a": np.float32(3)})
    refused("m-00002-of-00002.safetensors, which is missing", formats.weights_in, tmp_path, "m")
    (tmp_path / "m.safetensors.index.json").write_text("{")
    refused("JSON", formats.weights_in, tmp_path, "m")
    refused("has no weights .*: give the file itself, .*/t.pth", formats.weights_in, tmp_path, "other")
    a, b, c, ab, ba = (formats.fingerprint([tmp_path / n for n in names]) for names in ("a", "b", "c", "ab", "ba"))
    assert a == c != b and len(a) == 64 and ab != ba


def test_a_local_folder_goes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in ("stabilityai/stable-diffusion-2-1-base", "hf-hub:stabilityai/stable-diffusion-2-1"):
        refused(r"removed in November 2025: set config.diffusion.source to a mirror", origins.diffusers_folder, source)
    (tmp_path / "stabilityai/stable-diffusion-2-1-base").mkdir(parents=True)
    assert origins.diffusers_folder("stabilityai/stable-diffusion-2-1-base").is_dir()
    monkeypatch.setattr(origins, "download", lambda *_: pytest.fail("the hub was asked"))
    (tmp_path / "weights" / "clip").mkdir(parents=True)
    says = "config.x.source='weights/clpi' does not exist in the folder weights"
    refused(says, origins.open_source, "weights/clpi", "config.x.source")


@pytest.mark.parametrize("open_it", [origins.diffusers_folder, origins.open_source])
def test_stable_diffusion_in_one_file_is_named_with_its_conversion(tmp_path, open_it):
    file = tmp_path / "v2-1_512-ema-pruned.safetensors"
    formats.write_safetensors(file, {f"model.diffusion_model.input_blocks.{i}.weight": np.ones(2) for i in range(900)})
    refused(rf"in one file: .*from_single_file\('{file}'\).*diffusion.source=stable-diff", open_it, str(file))
    formats.write_safetensors(file, {"other.weight": np.ones(2)})
    refused("is a file: give the diffusers folder|no vision tower", open_it, str(file))


def test_messages_are_cut_to_a_screen_and_end_with_their_advice():
    error = UserError(f"unknown: {'x' * 10**6}: give another file")
    assert len(str(error)) < 1920 and str(error).endswith("x: give another file")


@pytest.mark.parametrize("find", [origins.diffusers_folder, origins.open_source])
def test_places_that_are_not_there(find, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source, match in (
        ("", "is empty"), ("no/such/folder", "does not exist"), ("local-dir:nothing", "does not exist"),
        ("hf-hub:someone/something", "the hub did not give it"), ("someone/something", "the hub did not give it"),
    ):  # fmt: skip
        said = refused(match, find, source, "config.x.source")
        assert "config.x.source" in said and len(said) < 600


def test_arrays_go_straight_to_their_shards():
    """Each device has its shard, in the requested dtype, with kernels transposed."""
    model = nnx.eval_shape(lambda: nnx.Linear(16, 24, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    weight, bias = np.arange(24 * 16, dtype=np.float32).reshape(24, 16), np.ones(24, np.float32)
    state = nnx.state(model)
    state = jax.tree.map(lambda a: a.update(sharding=NamedSharding(mesh, PartitionSpec("fsdp"))), state)
    kernel = names.assign(state, {"weight": weight, "bias": bias}, names.Table("linear"))["kernel"].get_value()
    assert kernel.dtype == jnp.bfloat16 and {s.data.shape for s in kernel.addressable_shards} == {(2, 24)}
    np.testing.assert_array_equal(np.asarray(kernel, np.float32), weight.T.astype(jnp.bfloat16).astype(np.float32))


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError), formats.new_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    with formats.new_folder(tmp_path / "link") as folder:
        (folder / "whole").write_text("")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "out"] and (tmp_path / "out/whole").exists()
    refused("exists already", formats.new_folder(tmp_path / "out").__enter__)
    refused("cannot be written", formats.new_folder("/proc/nothing/out").__enter__)
    monkeypatch.setattr(formats.Path, "is_mount", lambda path: path.name == "disk")
    refused("disk is a mount point: give a folder in it", formats.refuse_taken, tmp_path / "disk")


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
        both_towers(dataclasses.replace(spec_of(config), **{f: getattr(QUICK, f) for f in NOT_BUILT}))
    assert refused or name in ("source", "open_clip_name")


def test_transformers_models_and_options_that_are_not_implemented_are_named():
    for option in ("use_mask_token", "qkv_bias"):
        config = names.transformers_configs(DINOV2)[0] | {option: False}
        refused(f"{option}=false", names.from_transformers, config, {}, "x")
    known = "is a 'bert' model: give the folder of a whole .*Dinov2Model.* or SiglipModel"
    refused(known, names.from_transformers, {"model_type": "bert"}, {}, "x")


@pytest.mark.parametrize(("vocab", "activation"), [(32000, ""), (256000, "gelu_tanh")], ids=["siglip", "siglip2"])
def test_published_siglip_folders_are_read_as_open_clip_runs_them(vocab, activation):
    """transformers' published configs leave `hidden_act` at its default, tanh, in both towers of both versions."""
    config = dict(model_type="siglip", text_config=dict(vocab_size=vocab), vision_config=dict(image_size=224))
    spec, silent = names.from_transformers(config, {}, "x")
    assert (spec.activation, spec.text.activation, silent) == ("gelu", activation, {"activation"})
    giant = dict(hidden_size=1536, num_hidden_layers=40, num_attention_heads=16, intermediate_size=6144, image_size=256)
    spec, _ = names.from_transformers(config | dict(vision_config=giant), {}, "x")
    assert spec.activation == "gelu_tanh" and spec.text.activation == ("gelu" if vocab == 32000 else "")


def test_a_custom_config_takes_the_diffusion_model_from_its_folder(tmp_path):
    sd = small.diffusion()
    for part, options in sd.items():
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        written = json.dumps(options | {"_diffusers_version": "0.35", "revision": None})
        trees.change(tmp_path, {f"{part}/{name}": written})
    get_config = runpy.run_path(str(ROOT / "configs/custom.py"))["get_config"]
    config = get_config(f"ViT-B-32,{tmp_path}")
    configs.validate(config, 1)
    assert config.diffusion.source == str(tmp_path) and config.backbone.patch_size == 32
    want = configs.default("vitl14", sd).diffusion
    want.source = str(tmp_path)
    assert Diffusion.from_dict(config.diffusion.to_dict()) == Diffusion.from_dict(want.to_dict())
    (tmp_path / "vae/config.json").unlink()
    refused("vae/config.json is missing", get_config, f"ViT-B-32,{tmp_path}")


def long_clip(table, kept):
    """As Long-CLIP has it: four rows for each old one, between it and the next; the last ones are extrapolated."""
    at = kept + np.arange(4 * (len(table) - kept)) / 4
    low = np.minimum(at.astype(int), len(table) - 2)
    return np.concatenate([table[:kept], table[low] + (at - low)[:, None] * (table[low + 1] - table[low])])


@pytest.mark.parametrize(("old", "kept", "width"), [(77, 20, 5), (13, 0, 3), (9, 7, 2)])
def test_positions_are_stretched_as_long_clip_does_it(old, kept, width):
    table = np.random.default_rng(old).normal(size=(old, width)).astype(np.float32)
    want = long_clip(table.astype(np.float64), kept)
    got = names.stretch(table, len(want), kept)
    assert got.dtype == np.float32 and len(got) == (248 if old == 77 else len(want))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def longer(**changes):
    return dataclasses.replace(small.SPEC, text=dataclasses.replace(small.SPEC.text, **changes))


def test_a_checkpoint_is_stretched_only_where_that_is_asked_for(tmp_path):
    names.write_random_clip(folder := tmp_path / "clip", small.SPEC)
    stored = np.asarray(formats.open_file(folder / "open_clip_model.safetensors")["positional_embedding"])
    text = weights.load(str(folder), longer(context_length=248, kept_positions=20), tower="text")
    np.testing.assert_array_equal(text.pos_embed[...], names.stretch(stored, 248, 20))
    assert text.encode(np.zeros((2, 248), np.int32)).shape == (2, small.SPEC.embed_dim)
    same = weights.load(str(folder), longer(kept_positions=20), tower="text")
    np.testing.assert_array_equal(same.pos_embed[...], stored)
    plain = nnx.state(weights.load(str(folder), small.SPEC, tower="text"))
    assert len(nnx.to_flat_state(plain)) == len(nnx.to_flat_state(nnx.state(text)))
    for changes, says in (
        (dict(context_length=248), "context_length is 77 there and 248 in the config"),
        (dict(context_length=248, kept_positions=76), "kept_positions=76 cannot be kept of 77 .* use at most 75"),
        (dict(context_length=60, kept_positions=60), "use at most 59"),
        (dict(width=36, kept_positions=20), "width is 32 there"),
    ):
        refused(says, weights.load, str(folder), longer(**changes), tower="text")
