"""Embeddings that the original libraries compute, if they are installed, to check an export."""

import importlib
from pathlib import Path

import numpy as np

from diva_jax.models.backbones import Spec
from diva_jax.models.backbones.shared.open_clip_config import to_open_clip


def available(name: str) -> bool:
    """Returns whether `torch` and the library `name` can be imported."""
    try:
        import torch

        # torchvision's compiled operators do not load with a CPU build of torch. These two must exist to import
        # open_clip, but are not used here.
        for op in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, op):
                schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                torch.library.define(f"torchvision::{op}", schema)
        importlib.import_module(name)
    except Exception:  # An incomplete installation of an optional library is treated as a missing one.
        return False
    return True


def image(spec: Spec) -> np.ndarray:
    """Returns a smooth, normalised test image, float32 [1, H, W, 3]."""
    s = spec.image_size
    y, x = np.meshgrid(np.linspace(-1, 1, s), np.linspace(-1, 1, s), indexing="ij")
    channels = [np.sin(3 * x + y), np.cos(5 * y * x), np.sin(9 * x * x + 2 * y) * y]
    return np.stack(channels, -1)[None].astype(np.float32)


def pixels(images: np.ndarray):
    """Returns channels-last images as a channels-first tensor of PyTorch."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def open_clip_embeddings(folder: Path, images: np.ndarray, text: str | np.ndarray | None) -> tuple[np.ndarray, ...]:
    """open_clip's embeddings of images, float32 [B, H, W, 3], and a text with an open_clip folder, in float32. `text`
    is read by the folder's tokenizer, or is token ids, int [N, L]; None: a model without texts. Returns (image
    embeddings [B, D], and with a text its token ids [N, L] and embeddings [N, D])."""
    import open_clip
    import torch

    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model = model.float().eval()
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")([text]) if isinstance(text, str) else text
    with torch.no_grad():
        pooled = model.encode_image(pixels(images)).numpy()
        if ids is None:
            return (pooled,)
        ids = torch.as_tensor(ids)
        return pooled, ids.numpy(), model.encode_text(ids).numpy()


def _timm_tower(spec: Spec):
    """Returns timm's Vision Transformer of a DINOv2 `spec`."""
    import torch
    from timm.layers import SwiGLUPacked
    from timm.models.vision_transformer import VisionTransformer

    swiglu = spec.activation == "swiglu"
    options = dict(mlp_layer=SwiGLUPacked, act_layer=torch.nn.SiLU) if swiglu else {}
    if spec.registers:
        options |= dict(reg_tokens=spec.registers, no_embed_class=True)
    return VisionTransformer(
        img_size=spec.image_size,
        patch_size=spec.patch_size,
        embed_dim=spec.width,
        depth=spec.layers,
        num_heads=spec.heads,
        mlp_ratio=(spec.mlp_dim * (1 + swiglu) + 0.5) / spec.width,
        init_values=1.0,
        num_classes=0,
        **options,
    )


def tower_pooled(library: str, file: Path, spec: Spec, images: np.ndarray) -> np.ndarray:
    """The image embeddings [B, D], float32, of a vision tower's state dict, by the tower of "open_clip" or "timm"."""
    import torch

    state = torch.load(file, map_location="cpu", weights_only=True)
    if library == "timm":
        from timm.models.vision_transformer import checkpoint_filter_fn

        tower = _timm_tower(spec)
        state = checkpoint_filter_fn(state, tower)
    else:
        import open_clip

        cfg = dict(to_open_clip(spec)["model_cfg"])
        tower = (open_clip.CustomTextCLIP if cfg.pop("custom_text", False) else open_clip.CLIP)(**cfg).visual
    tower.load_state_dict(state, strict=True)
    with torch.no_grad():
        return tower.float().eval()(pixels(images)).numpy()


def transformers_embeddings(
    folder: Path, images: np.ndarray, text: str | np.ndarray | None, length: int
) -> tuple[tuple[np.ndarray, ...], list[str]]:
    """As `open_clip_embeddings`, of a transformers folder, for texts of `length` ids; missing and unexpected keys."""
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        options = dict(output_loading_info=True, dtype=torch.float32, trust_remote_code=False)
        model, info = AutoModel.from_pretrained(folder, **options)
        run = getattr(model.eval(), "get_image_features", model)  # A model with only a vision encoder is called itself.
        with torch.no_grad():
            out = (run(pixel_values=pixels(images)).pooler_output.numpy(),)
            if isinstance(text, str):
                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
                text = tokenizer([text], padding="max_length", max_length=length, truncation=True)["input_ids"]
            if text is not None:
                ids = torch.as_tensor(text)
                out += (ids.numpy(), model.get_text_features(input_ids=ids).pooler_output.numpy())
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    return out, [*info["missing_keys"], *info["unexpected_keys"]]
