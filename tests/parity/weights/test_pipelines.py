"""Folders of transformers and the world, from the image and the text, and as the tower of a multimodal model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import specs
import torch
import transformers
from eval_data import patch
from flax import nnx
from helpers import close, refused
from PIL import Image
from places import TESTS
from specs import CLIP_FOLDER as CLIP, METACLIP2_FOLDER, SIGLIP2_FOLDER, SIGLIP_FOLDER
from torch_models import transformers_folder, written_by_open_clip

import diva_jax
from diva_jax import demo, weights
from diva_jax.data import tokenizers
from diva_jax.models.backbones import TextSpec
from diva_jax.models.diffusion.presets import Diffusion
from diva_jax.weights import names, origins, parts
from diva_jax.weights.export import layouts
from diva_jax.world import models

_TEXTS, _WORDS = np.array([[5, 7, 98] + [0] * 8]), np.arange(10)[None] * 7
# MetaCLIP 2 pools at the first end token, whose id is not the highest; later tokens have no effect.
_ENDS = np.array([[0, 7, 98, 2, 1, 1, 1, 1, 1, 1, 1], [0, 95, 2, 2, 1, 1, 1, 1, 1, 1, 1]])
# Kind -> (its Spec, the image processor of transformers, token ids).
MODELS = dict(clip=(CLIP, "CLIP", _TEXTS), metaclip2=(METACLIP2_FOLDER, "CLIP", _ENDS))
MODELS |= dict(siglip=(SIGLIP_FOLDER, "Siglip", _WORDS), siglip2=(SIGLIP2_FOLDER, "Siglip", _WORDS))
MODELS |= {name: (spec, "Bit", None) for name, spec in specs.DINOV2S.items()}


def processor(kind, spec, rng, seed):
    """A processor with a generated size, crop and filter; DINOv2's images may be of another size than its weights'."""
    crop = (54, 30)[seed] if spec.arch == "dinov2" else spec.image_size
    options = dict(resample=int(rng.integers(6)))
    options |= dict(image_mean=rng.uniform(0.3, 0.6, 3).tolist(), image_std=rng.uniform(0.2, 0.4, 3).tolist())
    side = crop + int(rng.integers(1, 20))
    if spec.arch == "siglip" or rng.integers(4) == 0:
        return kind(size=dict(height=crop, width=crop), do_center_crop=False, **options)
    size = dict(shortest_edge=side) if rng.integers(3) else dict(height=side, width=side)
    return kind(size=size, crop_size=dict(height=crop, width=crop), **options)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", MODELS)
def test_images_and_texts(tmp_path, name, seed):
    """One of two from shards; test_layouts.py has the names of tensors."""
    spec, kind, ids = MODELS[name]
    kind, rng = getattr(transformers, f"{kind}ImageProcessorPil"), np.random.default_rng(seed)
    model = transformers_folder(tmp_path, spec, max_shard_size=("1GB", "100KB")[seed])
    prepare = processor(kind, spec, rng, seed)
    prepare.save_pretrained(tmp_path)
    if seed:  # As newer versions write it, which prefer it to an older file.
        options = {"image_processor": json.loads((tmp_path / "preprocessor_config.json").read_text())}
        (tmp_path / "processor_config.json").write_text(json.dumps(options))
        (tmp_path / "preprocessor_config.json").write_text("{}")
    image = Image.fromarray(rng.integers(0, 255, (*rng.integers(40, 100, 2), 3), np.uint8))
    with torch.no_grad():
        pixels = prepare(image, return_tensors="pt")["pixel_values"]
        want = getattr(model, "get_image_features", model)(pixel_values=pixels).pooler_output.numpy()
        if ids is not None:
            text = weights.load(str(tmp_path), spec, tower="text").encode(jnp.asarray(ids))
            close(text, model.get_text_features(input_ids=torch.from_numpy(ids)).pooler_output, 2e-5)
    close(diva_jax.load(str(tmp_path)).encode_image([image]), want, 2e-5)
    if spec.arch != "siglip":  # An export keeps the preparation.
        found = origins.open_source(str(tmp_path)).spec
        assert names.from_transformers(*names.transformers_configs(found), "a")[0] == found


@pytest.mark.parametrize(("option", "value"), json.loads((TESTS / "parity/refused.json").read_text())["preprocessor"])
def test_preparations_that_are_not_implemented_are_refused(option, value):
    config, preprocessor = names.transformers_configs(CLIP)
    says = rf"x/preprocessor_config.json .*has .*{option}'?="
    refused(says, names.from_transformers, config, preprocessor | {option: value}, "x")
    refused("which must be an object of options", names.from_transformers, config, [option], "x")


def test_older_forms_of_the_configs():
    """Sizes as numbers, and towers in `*_config_dict`."""
    config, preprocessor = names.transformers_configs(CLIP)
    old = config | {"vision_config": {}, "text_config": {"hidden_size": 8}}
    old |= {f"{t}_config_dict": config[f"{t}_config"] for t in ("vision", "text")}
    sizes = dict(size=30, crop_size=30, feature_extractor_type="CLIPFeatureExtractor", image_processor_type=None)
    assert names.from_transformers(old, preprocessor | sizes, "x")[0] == CLIP


TEXTS = ["a photo of a cat", "a photo of <cat-toy>", "<CAT-TOY>s and <New>, not <new>", "x<cat-toy>y"]


@pytest.mark.parametrize("written", ["tokenizer.json", "added_tokens.json"])
def test_added_tokens_of_clip(tmp_path, written):
    """Matched as transformers does, and the state is pooled at the end token, which is no longer the highest id."""
    demo.write_byte_tokenizer(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    theirs.add_tokens(["<cat-toy>"])
    if written == "tokenizer.json":
        theirs.add_special_tokens({"additional_special_tokens": ["<New>"]})
    text = TextSpec(context_length=77, vocab_size=len(theirs), width=48, heads=4, layers=2, mlp_dim=96)
    text = dataclasses.replace(text, pool="eos", eos_id=theirs.eos_token_id)
    model = transformers_folder(tmp_path, dataclasses.replace(CLIP, text=text))
    if written == "tokenizer.json":
        theirs.save_pretrained(tmp_path)
    else:
        (tmp_path / written).write_text(json.dumps({"<cat-toy>": len(theirs) - 1}))
    texts = TEXTS if written == "tokenizer.json" else TEXTS[:2]
    encoded = theirs(texts, padding="max_length", max_length=77, return_tensors="pt")
    ours = tokenizers.open_tokenizer(text, tmp_path)(texts)
    for mine, row, mask in zip(ours, encoded["input_ids"].numpy(), encoded["attention_mask"].numpy(), strict=True):
        np.testing.assert_array_equal(mine[: mask.sum()], row[: mask.sum()])
    with torch.no_grad():
        want = model.get_text_features(**encoded).pooler_output.numpy()
    close(diva_jax.load(str(tmp_path)).encode_text(texts), want, 2e-5)


def test_patch_tokens_of_the_layer_that_llava_selects(tmp_path):
    """What `load_model`, `forward` and `feature_select` of LLaVA's tower do with an exported folder."""
    written_by_open_clip(tmp_path / "in")
    layouts.export(origins.open_source(str(tmp_path / "in")), CLIP, folder := tmp_path / "out", "hf")
    prepare, photographs = transformers.CLIPImageProcessor.from_pretrained(folder), [patch(i) for i in range(3)]
    pixels = prepare(photographs, return_tensors="pt")["pixel_values"]
    theirs, info = transformers.CLIPVisionModel.from_pretrained(folder, device_map=None, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and theirs.config.hidden_size == CLIP.width
    assert (theirs.config.image_size // theirs.config.patch_size) ** 2 == CLIP.patches
    with torch.no_grad():  # mm_vision_select_layer is -2, mm_vision_select_feature "patch".
        want = theirs(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    ours = weights.load(str(folder), CLIP)
    x = ours._embedded(pixels.numpy().transpose(0, 2, 3, 1))
    for block in list(ours.blocks)[:-1]:
        x = block(x)
    close(x[:, 1:], want, 2e-5)


def test_diffusers_and_transformers_read_the_generator():
    """The journeys have the towers."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    texts = ["a photo of a red square", "a blue ring above a green star", "green heart", "a photo of a cross", ""]
    ids = tokenizers.open_tokenizer(models.SPEC.text, models.WEIGHTS / models.CLIP)(texts)
    folder = models.WEIGHTS / models.GENERATOR
    d = Diffusion.from_dict(dict(source="", prompt="", text_tokens=models.TOKENS, **models.DIFFUSION))
    text = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32).eval()
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).eval()
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    assert scheduler.config.prediction_type == d.scheduler.prediction_type == "v_prediction"
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    found = tokenizer(texts[0], padding="max_length")
    assert found["input_ids"][0] == ids[0, 0] and len(found["input_ids"]) == models.TOKENS
    noisy = np.random.default_rng(0).normal(size=(5, 2, 2, 64)).astype(np.float32)
    t = np.array([0, 100, 500, 900, 999])
    with torch.no_grad():
        states = text(torch.from_numpy(ids).long())[0]
        theirs = unet(torch.from_numpy(noisy).permute(0, 3, 1, 2), torch.from_numpy(t), states).sample
        padded = tokenizer([""], padding="max_length", return_tensors="pt")
        for value, mask in (("exact", None), ("faithful", padded["attention_mask"])):
            c = small.with_fields(models.base_config("dcr"), {"dcr__text_mask": value, "diffusion__prompt": ""})
            (found,) = small.program(c).objective.pretrained()["text_context"].open().tensors.values()
            close(np.asarray(found), text(padded["input_ids"], attention_mask=mask)[0], 2e-5)
    with jax.default_matmul_precision("highest"):
        ours = nnx.jit(lambda m, x: m(x))(parts.load(str(folder), d.text_encoder), ids)
        np.testing.assert_allclose(ours, states.numpy(), atol=2e-5 * float(states.abs().max()))
        pred = nnx.jit(lambda m, *a: m(*a))(parts.load(str(folder), d.unet), noisy, t, ours)
    np.testing.assert_allclose(pred, theirs.permute(0, 2, 3, 1).numpy(), atol=1e-4)
