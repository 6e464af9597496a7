"""Results of the original libraries, if they are installed, for exports and `parity`."""

import contextlib
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
        for op, schema in (
            ("nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
            ("qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
        ):
            if not hasattr(torch.ops.torchvision, op):
                torch.library.define(f"torchvision::{op}", schema)
        importlib.import_module(name)
    except Exception:  # An incomplete installation of an optional library is treated as a missing one.
        return False
    return True


@contextlib.contextmanager
def quiet():
    """Context manager without the progress bars and warnings of transformers."""
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
    """Returns a smooth, normalised test image, float32 [1, H, W, 3]."""
    s = spec.image_size
    y, x = np.meshgrid(np.linspace(-1, 1, s), np.linspace(-1, 1, s), indexing="ij")
    channels = [np.sin(3 * x + y), np.cos(5 * y * x), np.sin(9 * x * x + 2 * y) * y]
    return np.stack(channels, -1)[None].astype(np.float32)


def _pixels(images: np.ndarray):
    import torch

    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def open_clip_pooled(folder: Path, images: np.ndarray) -> np.ndarray:
    """Computes the image embeddings [B, D] of an open_clip folder with open_clip, in float32."""
    import open_clip
    import torch

    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    with torch.no_grad():
        return model.float().eval().encode_image(_pixels(images)).numpy()


def _tower_pooled(tower, state: dict, images: np.ndarray) -> np.ndarray:
    import torch

    tower.load_state_dict(state, strict=True)
    with torch.no_grad():
        return tower.float().eval()(_pixels(images)).numpy()


def open_clip_tower_pooled(file: Path, spec: Spec, images: np.ndarray) -> np.ndarray:
    """Computes the image embeddings [B, D] of a vision tower's state dict with open_clip's tower of `spec`."""
    import open_clip
    import torch

    cfg = dict(to_open_clip(spec)["model_cfg"])
    tower = (open_clip.CustomTextCLIP if cfg.pop("custom_text", False) else open_clip.CLIP)(**cfg).visual
    return _tower_pooled(tower, torch.load(file, map_location="cpu", weights_only=True), images)


def timm_tower_pooled(file: Path, spec: Spec, images: np.ndarray) -> np.ndarray:
    """Computes the image embeddings [B, D] of a DINOv2 state dict with timm's Vision Transformer of `spec`."""
    import torch
    from timm.layers import SwiGLUPacked
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    swiglu = spec.activation == "swiglu"
    options = dict(mlp_layer=SwiGLUPacked, act_layer=torch.nn.SiLU) if swiglu else {}
    if spec.registers:
        options |= dict(reg_tokens=spec.registers, no_embed_class=True)
    tower = VisionTransformer(
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
    state = torch.load(file, map_location="cpu", weights_only=True)
    return _tower_pooled(tower, checkpoint_filter_fn(state, tower), images)


# Library -> (file of a vision tower's state dict, spec, images [B, H, W, 3]) -> image embeddings [B, D].
TOWERS = {"open_clip": open_clip_tower_pooled, "timm": timm_tower_pooled}


def transformers_pooled(folder: Path, images: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Computes the image embeddings of a transformers folder with transformers, in float32.

    Returns:
      (embeddings [B, D], missing and unexpected keys).
    """
    import torch
    from transformers import AutoModel

    with quiet(), torch.no_grad():
        model, info = AutoModel.from_pretrained(
            folder, output_loading_info=True, dtype=torch.float32, trust_remote_code=False
        )
        run = getattr(model.eval(), "get_image_features", model)  # A model with only a vision encoder is called itself.
        found = run(pixel_values=_pixels(images))
    # Versions before 5 return the tensor itself.
    found = getattr(found, "pooler_output", found)
    return found.numpy(), [*info["missing_keys"], *info["unexpected_keys"]]


def _perturb(model, seed: int = 0):
    """Changes norms and biases from ones and zeros, for which swapped parameters would not be detected."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim < 2:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def new_open_clip(spec: Spec):
    """Returns open_clip's model of `spec` with random weights: by its name if open_clip has it, else by its config."""
    import open_clip

    if spec.open_clip_name in open_clip.list_models():
        return _perturb(open_clip.create_model(spec.open_clip_name))
    cfg = dict(to_open_clip(spec)["model_cfg"])
    return _perturb((open_clip.CustomTextCLIP if cfg.pop("custom_text", False) else open_clip.CLIP)(**cfg))


def save_open_clip(model, spec: Spec, folder: Path) -> None:
    """Writes an open_clip folder: the weights with safetensors' torch writer, the config with open_clip's."""
    import open_clip
    from open_clip.push_to_hf_hub import save_config_for_hf
    from safetensors.torch import save_file

    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    config = open_clip.get_model_config(spec.open_clip_name) or to_open_clip(spec)["model_cfg"]
    open_clip.model.set_model_preprocess_cfg(model, to_open_clip(spec)["preprocess_cfg"])
    save_config_for_hf(model, folder / "open_clip_config.json", config)


def write_open_clip(folder: Path, spec: Spec, images: np.ndarray) -> list[np.ndarray]:
    """Writes a random model of `spec` and runs it with open_clip.

    Args:
      folder: an existing folder.
      spec: the backbone.
      images: float32 [B, H, W, 3].

    Returns:
      [pooled [B, D], tokens [B, P, D]]: each patch token after the final norm and the projection, if any.
    """
    import torch

    model = new_open_clip(spec)
    save_open_clip(model, spec, folder)
    with torch.no_grad():
        return [model.encode_image(_pixels(images)).numpy(), _open_clip_tokens(model.visual, _pixels(images)).numpy()]


def _open_clip_tokens(visual, pixels):
    """Returns the patch tokens [B, P, D] of open_clip's vision tower, after the final norm and the projection."""
    trunk = getattr(visual, "trunk", None)
    if trunk is None:
        return (visual.ln_post(visual.transformer(visual._embeds(pixels))) @ visual.proj)[:, 1:]
    # A tower of timm; the head is the projection, or the identity.
    return trunk.head(trunk.forward_features(pixels)[:, trunk.num_prefix_tokens :])


def write_diffusers_unet(folder: Path, options: dict, sample, timesteps, context, class_labels=None) -> np.ndarray:
    """Writes a random U-Net with `save_pretrained`; returns its output [B, H, W, C] for channels-last inputs."""
    import torch
    from diffusers import UNet2DConditionModel

    model = _perturb(UNet2DConditionModel.from_config(dict(options)))
    model.save_pretrained(folder)
    labels = None if class_labels is None else torch.from_numpy(class_labels)
    with torch.no_grad():
        out = model(_pixels(sample), torch.from_numpy(timesteps), torch.from_numpy(context), class_labels=labels).sample
    return out.numpy().transpose(0, 2, 3, 1)
