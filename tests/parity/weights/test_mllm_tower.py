"""An export as the vision tower of a multimodal model: the calls of LLaVA's `CLIPVisionTower`, through transformers."""

import pytest
import torch
from clip_folders import CLIP
from eval_data import patch
from exports import written_by_open_clip
from helpers import close
from transformers import CLIPImageProcessor, CLIPVisionModel

from diva_jax import weights
from diva_jax.weights import origins
from diva_jax.weights.export import layouts

LAYER = -2  # LLaVA's mm_vision_select_layer; its mm_vision_select_feature is "patch".


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("mllm")
    written_by_open_clip(CLIP, root / "in")
    layouts.export(origins.open_source(str(root / "in")), CLIP, root / "out", "hf")
    return root / "out"


def selected(folder, pixels):
    """What `load_model`, `forward` and `feature_select` of LLaVA's tower do with a folder."""
    tower, info = CLIPVisionModel.from_pretrained(folder, device_map=None, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    tower.requires_grad_(False)
    with torch.no_grad():
        found = tower(pixels.to(device=tower.device, dtype=tower.dtype), output_hidden_states=True)
    assert tower.config.hidden_size == CLIP.width
    assert (tower.config.image_size // tower.config.patch_size) ** 2 == CLIP.patches
    return found.hidden_states[LAYER][:, 1:].to(pixels.dtype)


def ours(folder, pixels):
    """Patch tokens before the last block, of channels-last normalised images."""
    tower = weights.load(str(folder), CLIP)
    x = tower._embedded(pixels)
    for block in list(tower.blocks)[: LAYER + 1]:
        x = block(x)
    return x[:, 1:]


def test_patch_tokens_of_the_layer_that_llava_selects(exported):
    processor = CLIPImageProcessor.from_pretrained(exported)
    photographs = [patch(i) for i in range(3)]
    pixels = processor.preprocess(photographs, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (3, 3, CLIP.image_size, CLIP.image_size)
    theirs = selected(exported, pixels)
    assert theirs.shape == (3, CLIP.patches, CLIP.width)
    close(ours(exported, pixels.numpy().transpose(0, 2, 3, 1)), theirs.numpy(), 2e-5)
