"""Models of the original libraries with random weights, which the programs here compare with or load."""

from pathlib import Path

import numpy as np

from diva_jax.models.backbones import Spec
from diva_jax.models.backbones.shared.open_clip_config import to_open_clip
from diva_jax.weights.export.layouts import pixels


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
        return [model.encode_image(pixels(images)).numpy(), _open_clip_tokens(model.visual, pixels(images)).numpy()]


def _open_clip_tokens(visual, images):
    """Returns the patch tokens [B, P, D] of open_clip's vision tower, after the final norm and the projection."""
    trunk = getattr(visual, "trunk", None)
    if trunk is None:
        return (visual.ln_post(visual.transformer(visual._embeds(images))) @ visual.proj)[:, 1:]
    # A tower of timm; the head is the projection, or the identity.
    return trunk.head(trunk.forward_features(images)[:, trunk.num_prefix_tokens :])


def write_diffusers_unet(folder: Path, options: dict, sample, timesteps, context, class_labels=None) -> np.ndarray:
    """Writes a random U-Net with `save_pretrained`; returns its output [B, H, W, C] for channels-last inputs."""
    import torch
    from diffusers import UNet2DConditionModel

    model = _perturb(UNet2DConditionModel.from_config(dict(options)))
    model.save_pretrained(folder)
    labels = None if class_labels is None else torch.from_numpy(class_labels)
    with torch.no_grad():
        out = model(pixels(sample), torch.from_numpy(timesteps), torch.from_numpy(context), class_labels=labels).sample
    return out.numpy().transpose(0, 2, 3, 1)
