"""The kept weights of the world in open_clip, diffusers and transformers."""

import jax
import numpy as np
import torch
from flax import nnx

from diva_jax.data import tokenizers
from diva_jax.models.diffusion.settings import Diffusion
from diva_jax.weights import loading
from diva_jax.world import captions, models, scenes


def test_diffusers_and_transformers_read_the_generator():
    """The journeys have the towers."""
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    scene, chosen = (
        scenes.sample(np.random.default_rng(3), 5),
        captions.choose(np.random.default_rng(4), 5, 1.0),
    )
    texts = captions.captions(scene, chosen)
    texts[0] = "a photo of a red square"
    ids = tokenizers.open_tokenizer(models.SPEC.text, models.WEIGHTS / models.CLIP)(texts)
    folder = models.WEIGHTS / models.GENERATOR
    d = Diffusion.from_dict(dict(source="", prompt="", text_tokens=models.TOKENS, **models.DIFFUSION))
    text = CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32).eval()
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).eval()
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    assert scheduler.config.prediction_type == d.scheduler.prediction_type == "v_prediction"
    found = CLIPTokenizer.from_pretrained(folder / "tokenizer")("a photo of a red square", padding="max_length")
    assert found["input_ids"][0] == ids[0, 0] and len(found["input_ids"]) == models.TOKENS
    noisy = np.random.default_rng(0).normal(size=(5, 2, 2, 64)).astype(np.float32)
    t = np.array([0, 100, 500, 900, 999])
    with torch.no_grad():
        states = text(torch.from_numpy(ids).long())[0]
        theirs = unet(torch.from_numpy(noisy).permute(0, 3, 1, 2), torch.from_numpy(t), states).sample
    with jax.default_matmul_precision("highest"):
        ours = nnx.jit(lambda m, x: m(x))(loading.load(str(folder), d.text_encoder), ids)
        np.testing.assert_allclose(ours, states.numpy(), atol=2e-5 * float(states.abs().max()))
        pred = nnx.jit(lambda m, *a: m(*a))(loading.load(str(folder), d.unet), noisy, t, ours)
    np.testing.assert_allclose(pred, theirs.permute(0, 2, 3, 1).numpy(), atol=1e-4)
