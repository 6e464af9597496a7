"""The original libraries, where they are installed, to hold our results against: exports and `parity` use it."""

import contextlib
import importlib
from pathlib import Path

import numpy as np

from diva_jax.backbones import Spec


def available(name: str) -> bool:
    """Whether `torch` and the library `name` can be imported."""
    try:
        import torch

        # torchvision's compiled operators do not load beside a CPU build of torch; open_clip's imports name these
        # two and nothing here runs them.
        for op, schema in (
            ("nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
            ("qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
        ):
            if not hasattr(torch.ops.torchvision, op):
                torch.library.define(f"torchvision::{op}", schema)
        importlib.import_module(name)
    except Exception:  # A broken install of an optional library is as good as none.
        return False
    return True


@contextlib.contextmanager
def quiet():
    """Without the progress bars and warnings of transformers' loading."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def image(spec: Spec) -> np.ndarray:
    """A smooth, normalised test image, float32 [1, H, W, 3]."""
    s = spec.image_size
    y, x = np.meshgrid(np.linspace(-1, 1, s), np.linspace(-1, 1, s), indexing="ij")
    channels = [np.sin(3 * x + y), np.cos(5 * y * x), np.sin(9 * x * x + 2 * y) * y]
    return np.stack(channels, -1)[None].astype(np.float32)


def _pixels(images: np.ndarray):
    import torch

    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def open_clip_pooled(folder: Path, images: np.ndarray) -> np.ndarray:
    """Image embeddings [B, D] of an open_clip folder, by open_clip itself, in float32."""
    import open_clip
    import torch

    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    with torch.no_grad():
        return model.float().eval().encode_image(_pixels(images)).numpy()


def open_clip_tower_pooled(file: Path, config: dict, images: np.ndarray) -> np.ndarray:
    """Image embeddings [B, D] of a vision tower's state dict in open_clip's tower of `config`."""
    import open_clip
    import torch

    cfg = {k: v for k, v in config["model_cfg"].items() if k != "custom_text"}
    custom = config["model_cfg"].get("custom_text", False)
    tower = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**cfg).visual
    state = torch.load(file, map_location="cpu", weights_only=True)
    tower.load_state_dict(state, strict=True)
    with torch.no_grad():
        return tower.float().eval()(_pixels(images)).numpy()


def transformers_pooled(folder: Path, images: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """(image embeddings [B, D] of a CLIPModel or SiglipModel folder in float32, missing and unexpected keys)."""
    import torch
    from transformers import AutoModel

    with quiet(), torch.no_grad():
        model, info = AutoModel.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
        found = model.eval().get_image_features(pixel_values=_pixels(images))
    # Versions before 5 return the tensor itself.
    found = getattr(found, "pooler_output", found)
    return found.numpy(), [*info["missing_keys"], *info["unexpected_keys"]]
