"""The original libraries' vision towers of a Spec, with random weights."""

import numpy as np
import timm.models.vision_transformer as timm_vit
import torch
from helpers import randomise, tensors
from open_clip.transformer import QuickGELU, VisionTransformer
from timm.layers import SwiGLUPacked
from timm.models.eva import Eva

from diva_jax.models.backbones import Spec


def _ratio(spec: Spec, times: int = 1) -> float:
    """Returns a ratio for which `int(width * ratio)` is the width of the MLP."""
    return (spec.mlp_dim * times + 0.5) / spec.width


def _vit(spec: Spec) -> torch.nn.Module:
    return VisionTransformer(
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        width=spec.width,
        layers=spec.layers,
        heads=spec.heads,
        mlp_ratio=_ratio(spec),
        output_dim=spec.embed_dim,
        act_layer=QuickGELU if spec.activation == "quick_gelu" else torch.nn.GELU,
        norm_layer=lambda n: torch.nn.LayerNorm(n, eps=spec.norm_eps),
    )


def _sizes(spec: Spec) -> dict:
    return dict(
        img_size=spec.image_size,
        patch_size=spec.patch_size,
        embed_dim=spec.width,
        depth=spec.layers,
        num_heads=spec.heads,
    )


def _siglip(spec: Spec) -> torch.nn.Module:
    options = dict(mlp_ratio=_ratio(spec), class_token=False, global_pool="map", num_classes=0)
    return timm_vit.VisionTransformer(**_sizes(spec), **options)


def _eva02(spec: Spec) -> torch.nn.Module:
    return Eva(
        **_sizes(spec),
        qkv_fused=False,
        mlp_ratio=_ratio(spec),
        swiglu_mlp=True,
        scale_mlp=True,
        scale_attn_inner=True,
        use_rot_pos_emb=True,
        ref_feat_shape=(16, 16),
        num_classes=spec.embed_dim,
        global_pool="token",
    )


class Dinov2(timm_vit.VisionTransformer):
    """timm's tower, with position embeddings for the class token and none for registers, as in the authors' code."""

    def _pos_embed(self, x):
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        registers = self.register_tokens.expand(len(x), -1, -1)
        return torch.cat([x[:, :1], registers, x[:, 1:]], 1)


def _dinov2(spec: Spec) -> torch.nn.Module:
    swiglu = spec.activation == "swiglu"
    options = dict(mlp_layer=SwiGLUPacked, act_layer=torch.nn.SiLU) if swiglu else {}
    options |= dict(mlp_ratio=_ratio(spec, 1 + swiglu), init_values=1.0, num_classes=0)
    if not spec.registers:
        return timm_vit.VisionTransformer(**_sizes(spec), **options)
    tower = Dinov2(**_sizes(spec), **options)
    tower.register_tokens = torch.nn.Parameter(torch.zeros(1, spec.registers, spec.width))
    tower.num_prefix_tokens += spec.registers
    return tower


_MAKE = {"vit": _vit, "siglip": _siglip, "eva02": _eva02, "dinov2": _dinov2}
PREFIX = {"vit": "visual.", "siglip": "visual.trunk.", "eva02": "visual.trunk.", "dinov2": "visual."}


def torch_tower(spec: Spec) -> torch.nn.Module:
    """Returns the vision tower of open_clip or timm with random weights."""
    return randomise(_MAKE[spec.arch](spec), seed=spec.width)


def checkpoint_name(spec: Spec, name: str) -> str:
    """Returns the name of a parameter of `torch_tower` in a checkpoint."""
    if spec.activation == "swiglu":
        name = name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
    return PREFIX[spec.arch] + name


def checkpoint(spec: Spec, tower: torch.nn.Module) -> dict[str, np.ndarray]:
    """Returns the tensors of `torch_tower` under the names of a checkpoint."""
    return {checkpoint_name(spec, k): v for k, v in tensors(tower).items()}


def torch_features(tower: torch.nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [B, 3, H, W] -> (tokens, pooled): pooled is the library's result, tokens are computed in the same way."""
    if isinstance(tower, VisionTransformer):
        x = tower.transformer(tower._embeds(images))
        return (tower.ln_post(x) @ tower.proj)[:, 1:], tower(images)
    tokens = tower.forward_features(images)[:, tower.num_prefix_tokens :]
    return (tower.head(tokens) if isinstance(tower, Eva) else tokens), tower(images)
