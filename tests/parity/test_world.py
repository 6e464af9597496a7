"""The kept weights of the world in open_clip, diffusers and transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from diva_jax.data import tokenizers
from diva_jax.models.diffusion.settings import Diffusion
from diva_jax.weights import loading
from diva_jax.world import captions, drawing, models, scenes


@pytest.fixture(scope="module")
def scene():
    return scenes.sample(np.random.default_rng(3), 5)


@pytest.fixture(scope="module")
def ids(scene):
    folder = models.WEIGHTS / models.CLIP
    texts = captions.captions(scene, captions.choose(np.random.default_rng(4), 5, captions.RICH))
    return tokenizers.open_tokenizer(models.SPEC.text, folder)(texts)


def test_open_clip_reads_both_towers(scene, ids):
    import open_clip

    folder = models.WEIGHTS / models.CLIP
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    images = drawing.draw(scene).astype(np.float32) / 127.5 - 1
    with torch.no_grad():
        theirs = model.encode_image(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
        texts = model.encode_text(torch.from_numpy(ids).long()).numpy()
    spec = dataclasses.replace(models.SPEC, source=str(folder))
    ours = loading.load(str(folder), spec).encode(jnp.asarray(images)).pooled
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())
    ours = loading.load(str(folder), spec, tower="text").encode(jnp.asarray(ids))
    np.testing.assert_allclose(ours, texts, atol=2e-5 * np.abs(texts).max())


def test_diffusers_and_transformers_read_the_generator(ids):
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = models.WEIGHTS / models.GENERATOR
    d = Diffusion.from_dict(dict(source="", prompt="", text_tokens=models.TOKENS, **models.DIFFUSION))
    text = CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32).eval()
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).eval()
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    assert scheduler.config.prediction_type == d.scheduler.prediction_type == "v_prediction"
    found = CLIPTokenizer.from_pretrained(folder / "tokenizer")("a photo of two red circles", padding="max_length")
    assert found["input_ids"][0] == ids[0, 0] and len(found["input_ids"]) == models.TOKENS
    noisy = np.random.default_rng(0).normal(size=(5, 8, 8, 12)).astype(np.float32)
    t = np.array([0, 100, 500, 900, 999])
    with torch.no_grad():
        states = text(torch.from_numpy(ids).long())[0]
        theirs = unet(torch.from_numpy(noisy).permute(0, 3, 1, 2), torch.from_numpy(t), states).sample
    with jax.default_matmul_precision("highest"):
        ours = nnx.jit(lambda m, x: m(x))(loading.load(str(folder), d.text_encoder), ids)
        np.testing.assert_allclose(ours, states.numpy(), atol=2e-5 * float(states.abs().max()))
        pred = nnx.jit(lambda m, *a: m(*a))(loading.load(str(folder), d.unet), noisy, t, ours)
    np.testing.assert_allclose(pred, theirs.permute(0, 2, 3, 1).numpy(), atol=1e-4)
