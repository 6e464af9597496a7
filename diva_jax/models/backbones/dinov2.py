"""DINOv2's Vision Transformer (arXiv 2304.07193), with or without registers (arXiv 2309.16588); no text tower.

Checkpoints have the names of the authors' torch.hub models, here under `visual.`; timm's are the same for models
without registers but the giant one. Position embeddings are interpolated as transformers does it.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from diva_jax.common.errors import UserError
from diva_jax.models.backbones import IMAGENET_MEAN, IMAGENET_STD, NO_TEXT, Features, Spec
from diva_jax.models.backbones.shared import open_clip_config as occ, transformers_layout as hf
from diva_jax.models.backbones.shared.transformer import Block, embedded, run
from diva_jax.models.layers import Layers
from diva_jax.models.names import tensor_shape

# The mask token of pretraining is in published checkpoints and in no forward pass; transformers interpolates the
# positions of models with registers with antialiasing.
CHECKPOINT = occ.checkpoint("dinov2")


class LayerScale(nnx.Module):
    """A learned factor for each channel (arXiv 2103.17239), initially `value`."""

    def __init__(self, make: Layers, width: int, value: float):
        self.gamma = make.param(nnx.initializers.constant(value), width)

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., D] -> [..., D]
        return x * self.gamma[...].astype(x.dtype)


class SwiGLU(nnx.Module):
    """silu(a) * b of one fused projection to (a, b), then a linear layer (arXiv 2002.05202)."""

    def __init__(self, make: Layers, width: int, hidden: int):
        self.w12 = make.linear(width, 2 * hidden)
        self.w3 = make.linear(hidden, width)

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., D] -> [..., D]
        a, b = jnp.split(self.w12(x), 2, axis=-1)
        return self.w3(jax.nn.silu(a) * b)


class ScaledBlock(Block):
    """x + ls1 * attention(norm1(x)), then x + ls2 * mlp(norm2(x))."""

    def __init__(self, make: Layers, spec: Spec):
        width = spec.width
        super().__init__(make, width, spec.heads, spec.mlp_dim, spec.activation, spec.norm_eps)
        if spec.activation == "swiglu":
            self.mlp = SwiGLU(make, width, spec.mlp_dim)
        # So that the variance of the residual stream does not grow with depth; checkpoints bring their own values.
        scale = (2 * spec.layers) ** -0.5
        self.ls1, self.ls2 = LayerScale(make, width, scale), LayerScale(make, width, scale)

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, N, D] -> [B, N, D]
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Vision(nnx.Module):
    """The vision encoder of `spec` with random weights; arguments as `backbones.build`'s."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32, remat: bool = False):
        make = Layers(rngs, dtype, param_dtype)
        width = spec.width
        if spec.embed_dim != width:
            raise UserError(f"a dinov2 backbone has no projection: set its embed_dim to its width, {width}")
        self.dtype, self.remat, self.registers = dtype, remat, spec.registers
        near_zero = nnx.initializers.normal(0.02)
        self.cls_token = make.param(near_zero, 1, 1, width)
        self.pos_embed = make.param(near_zero, 1, 1 + spec.patches, width)
        if spec.registers:
            self.register_tokens = make.param(near_zero, 1, spec.registers, width)
        self.patch_embed = make.conv(3, width, spec.patch_size, spec.patch_size)
        self.blocks = nnx.List([ScaledBlock(make, spec) for _ in range(spec.layers)])
        self.norm = make.layer_norm(width, spec.norm_eps)

    def encode(self, images: jax.Array) -> Features:
        """Normalised float images [B, H, W, 3] -> tokens [B, P, D] and pooled [B, D], in `dtype`. Both are taken after
        the final norm; pooled is the class token. Registers have no position embedding and are left out of the tokens.
        """
        x = embedded(self, images, self.cls_token)
        if self.registers:
            tokens = self.register_tokens[...].astype(self.dtype)
            x = jnp.concatenate([x[:, :1], jnp.broadcast_to(tokens, (len(x), *tokens.shape[1:])), x[:, 1:]], axis=1)
        x = self.norm(run(self.blocks, x, remat=self.remat))  # [B, 1 + R + P, D]
        return Features(tokens=x[:, 1 + self.registers :], pooled=x[:, 0])


def shapes(tensors: Mapping) -> dict:
    """The fields of Spec that a checkpoint's shapes tell: all but the heads and the MLP's activation, if not SwiGLU."""
    register_tokens, w3 = "visual.register_tokens", "visual.blocks.0.mlp.w3.weight"
    found = CHECKPOINT.shapes(tensors, "mlp.w3.weight" if w3 in tensors else "mlp.fc1.weight")
    found |= dict(registers=tensor_shape(tensors, register_tokens, 3)[1] if register_tokens in tensors else 0)
    return found | (dict(activation="swiglu", mlp_dim=tensor_shape(tensors, w3)[1]) if w3 in tensors else {})


_PATCH = {"dinov2": 14, "dinov2_with_registers": 16}
_MODELS = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}


def _hidden(width: int, ratio: float, swiglu: bool) -> int:
    """The width inside the MLP: with SwiGLU two thirds as much, rounded up to a multiple of 8."""
    hidden = int(width * ratio)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if swiglu else hidden


def _from_config(config: Mapping[str, Any], preprocessor: Mapping, where: str) -> tuple[Spec, frozenset[str]]:
    kind = config["model_type"]
    registers = {"num_register_tokens": 4} if kind == "dinov2_with_registers" else {}
    c = hf.options(config, hf.DEFAULTS["dinov2"] | dict(patch_size=_PATCH[kind]) | registers, f"{where}: config.json")
    for option in ("qkv_bias", "use_mask_token"):
        if not c[option]:
            raise UserError(f"{where} has {option}=false: only models that have it are implemented")
    width, swiglu = c["hidden_size"], c["use_swiglu_ffn"]
    spec = Spec(
        arch="dinov2",
        **hf.vision_fields(c | dict(intermediate_size=_hidden(width, c["mlp_ratio"], swiglu)))
        | hf.preprocessing(preprocessor, c["image_size"], IMAGENET_MEAN, IMAGENET_STD, where, any_size=True),
        embed_dim=width,
        activation="swiglu" if swiglu else hf.our_activation(c, where),
        text=NO_TEXT,
        registers=c["num_register_tokens"] if registers else 0,
    )
    return spec, frozenset()


def _to_config(spec: Spec, dtype: str) -> dict:
    swiglu = spec.activation == "swiglu"
    ratio = next((r for r in range(1, 17) if _hidden(spec.width, r, swiglu) == spec.mlp_dim), None)
    if ratio is None:
        problem = f"{spec.mlp_dim} is no multiple of {spec.width}"
        raise UserError(f"transformers has no dinov2 model with such an mlp_dim, {problem}: use --format=pt")
    kind = "dinov2_with_registers" if spec.registers else "dinov2"
    config = dict(
        architectures=[_MODELS[kind]],
        model_type=kind,
        dtype=dtype,
        **{option: getattr(spec, field) for field, option in hf.VISION.items() if field != "mlp_dim"},
        **dict(mlp_ratio=ratio, num_channels=3, qkv_bias=True, use_swiglu_ffn=swiglu),
    )
    config["hidden_act"] = "gelu" if swiglu else hf.their_activation(spec.activation)
    return config | (dict(num_register_tokens=spec.registers) if spec.registers else dict(use_mask_token=True))


TRANSFORMERS = hf.Layout(_MODELS, "embeddings.cls_token", _from_config, _to_config, "Bit")
