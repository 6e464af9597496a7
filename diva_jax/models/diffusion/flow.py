"""A transformer that predicts the velocity of a rectified flow, with the blocks of Black Forest Labs' FLUX.1.

The names of parameters are those of github.com/black-forest-labs/flux, `flux/model.py`, but for the layers of the MLPs.
Double blocks have separate weights for text and image tokens and one joint attention; single blocks have attention and
MLP in parallel. Sequences are text first, then image.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diva_jax.common.errors import UserError
from diva_jax.common.fields import above, between, field
from diva_jax.models.attention import attention
from diva_jax.models.backbones.shared.transformer import Mlp
from diva_jax.models.diffusion.blocks import call
from diva_jax.models.layers import ACTIVATIONS, Array, Keys, Layers, split_qkv, widened

_EPSILON = 1e-6
_CODE = 256  # Width of the code of a timestep.


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """Shape of the transformer; the defaults are GenHancer's (arXiv 2503.19480), 1,310,154,816 parameters."""

    in_channels: int = field(64, "The channels of a packed latent token.", between(1, 2**20))
    vector_dim: int = field(768, "The width of the pooled condition, which modulates every block.", between(1, 2**20))
    text_dim: int = field(4096, "The width of the text tokens.", between(1, 2**20))
    width: int = field(3072, "The width of the transformer.", between(1, 2**20))
    heads: int = field(24, "The heads of the attention.", between(1, 1024))
    double_blocks: int = field(2, "The number of blocks with separate weights for image and text.", between(0, 1024))
    single_blocks: int = field(4, "The number of blocks with the same weights for image and text.", between(0, 1024))
    axes: tuple[int, ...] = field((16, 56, 56), "A head's channels for each component of a position (0, row, column).")
    theta: float = field(10000.0, "The base of the rotary embedding.", above(0))
    mlp_ratio: float = field(4.0, "The hidden width of the MLPs, over the width of the transformer.", above(0))
    zero_out: bool = field(
        False,
        "Whether the last layers of modulations and the output layer start at zero, as in DiT (arXiv 2212.09748, "
        "section 3.2), and not as PyTorch initialises any linear layer.",
    )

    def __post_init__(self):
        if self.width % self.heads:
            raise UserError(f"the denoiser's width={self.width} must be a multiple of its heads={self.heads}")
        if len(self.axes) != 3 or any(n < 0 or n % 2 for n in self.axes) or sum(self.axes) != self.width // self.heads:
            wanted = f"three even numbers whose sum is the width of a head, {self.width // self.heads}"
            raise UserError(f"the denoiser's axes={self.axes} must be {wanted}")

    @property
    def hidden(self) -> int:
        """Hidden width of the MLPs."""
        return int(self.width * self.mlp_ratio)


class TorchLayers(Layers):
    """Layers whose linear ones start as PyTorch's, weight and bias uniform in +-1/sqrt(n_in), or at zero."""

    def linear(self, n_in: int, n_out: int, zero: bool = False) -> nnx.Linear:
        bound = 0.0 if zero else n_in**-0.5

        def init(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        return nnx.Linear(n_in, n_out, kernel_init=init, bias_init=init, **self._kw)


class Projector(nnx.Module):
    """LayerNorm, linear, exact GELU, linear: [B, n_in] -> [B, n_out]."""

    def __init__(self, n_in: int, n_out: int, layers: TorchLayers):
        self.norm = layers.layer_norm(n_in, 1e-5)
        self.fc1, self.fc2 = layers.linear(n_in, n_out), layers.linear(n_out, n_out)

    def __call__(self, x: Array) -> Array:
        return self.fc2(ACTIVATIONS["gelu"](self.fc1(self.norm(x))))


def frequencies() -> np.ndarray:
    """10000^(-k / 128), k = 0..127, [128], computed in float32 as FLUX does."""
    half = _CODE // 2
    return np.exp(np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half))


def timestep_code(t: Array, freqs: np.ndarray | None = None) -> Array:
    """[cos(1000 t f), sin(1000 t f)], [B] -> [B, 256], computed in float32 and returned in the dtype of t. In bfloat16,
    1000 t is rounded to bfloat16 as well. `freqs`, f, is by default `frequencies()`, [128]; at t = 4, a guidance's
    strength, one unit in its last place changes the code by 4e-5."""
    angles = (1000 * t)[:, None].astype(jnp.float32) * (frequencies() if freqs is None else freqs)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1).astype(t.dtype)


def token_positions(grid: tuple[int, int], text: int = 1) -> np.ndarray:
    """Positions of text tokens, (0, 0, 0), then of image tokens, (0, row, column), in raster order: [text + h w, 3]."""
    rows, columns = np.meshgrid(*(np.arange(n) for n in grid), indexing="ij")
    image = np.stack([np.zeros(rows.size), rows.ravel(), columns.ravel()], axis=-1)
    return np.concatenate([np.zeros((text, 3)), image])


def rotations(config: FlowConfig, grid: tuple[int, int], text: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of the rotary angles (arXiv 2104.09864, section 3.4.2) of `token_positions`: two float32 arrays
    [text + h * w, head width / 2], computed in float64."""
    ids = token_positions(grid, text)
    angles = [ids[:, i : i + 1] * config.theta ** (-np.arange(0, d, 2) / d) for i, d in enumerate(config.axes)]
    angles = np.concatenate(angles, axis=-1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates consecutive pairs of channels, [B, N, H, D]; cos and sin are [N, D / 2]."""
    y = widened(x).reshape(*x.shape[:-1], -1, 2)
    cos, sin = cos[None, :, None], sin[None, :, None]
    first, second = y[..., 0], y[..., 1]
    return jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=-1).reshape(x.shape).astype(x.dtype)


@jax.named_scope("norm")
def _normalise(x: Array) -> Array:
    """LayerNorm over the last axis without weights; statistics in at least float32."""
    y = widened(x)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    return (y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + _EPSILON)).astype(x.dtype)


class Rms(nnx.Module):
    """y * rsqrt(mean(y^2) + 1e-6) * scale over the last axis (arXiv 1910.07467, equation 4)."""

    def __init__(self, n: int, layers: TorchLayers):
        self.scale = layers.param(nnx.initializers.ones, n)

    @jax.named_scope("norm")
    def __call__(self, x: Array) -> Array:
        y = widened(x)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + _EPSILON)
        return y.astype(x.dtype) * self.scale[...].astype(x.dtype)


class QKNorm(nnx.Module):
    """RMS norms of queries and keys, per head."""

    def __init__(self, n: int, layers: TorchLayers):
        self.query_norm, self.key_norm = Rms(n, layers), Rms(n, layers)

    def __call__(self, q: Array, k: Array) -> tuple[Array, Array]:
        return self.query_norm(q), self.key_norm(k)


class Embedder(nnx.Module):
    """Linear, SiLU, linear: [..., n_in] -> [..., n]."""

    def __init__(self, n_in: int, n: int, layers: TorchLayers):
        self.in_layer, self.out_layer = layers.linear(n_in, n), layers.linear(n, n)

    def __call__(self, x: Array) -> Array:
        return self.out_layer(jax.nn.silu(self.in_layer(x)))


class Modulation(nnx.Module):
    """`count` vectors for the tokens of each image: linear(silu(v)), [B, width] -> count of [B, 1, width]."""

    def __init__(self, count: int, config: FlowConfig, layers: TorchLayers):
        self.count = count
        self.lin = layers.linear(config.width, count * config.width, config.zero_out)

    def __call__(self, v: Array) -> list[Array]:
        return jnp.split(self.lin(jax.nn.silu(v))[:, None], self.count, axis=-1)


class SelfAttention(nnx.Module):
    """Projections and norms of one stream; the attention itself is that of both streams together."""

    def __init__(self, config: FlowConfig, layers: TorchLayers):
        self.heads = config.heads
        self.qkv = layers.linear(config.width, 3 * config.width)
        self.norm = QKNorm(config.width // config.heads, layers)
        self.proj = layers.linear(config.width, config.width)

    def __call__(self, x: Array) -> tuple[Array, Array, Array]:
        """[B, N, width] -> queries, keys and values, each [B, N, H, D]."""
        q, k, v = split_qkv(self.qkv(x), self.heads)
        return *self.norm(q, k), v


class DoubleBlock(nnx.Module):
    """Joint attention of both streams, then an MLP on each; all modulated by v."""

    def __init__(self, config: FlowConfig, layers: TorchLayers):
        def stream():
            mod, attn = Modulation(6, config, layers), SelfAttention(config, layers)
            return mod, attn, Mlp(layers, config.width, config.hidden, "gelu_tanh")

        self.img_mod, self.img_attn, self.img_mlp = stream()
        self.txt_mod, self.txt_attn, self.txt_mlp = stream()

    def __call__(self, img: Array, txt: Array, v: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
        """[B, N, width], [B, T, width], [B, width] -> both streams."""
        streams = ((txt, self.txt_mod, self.txt_attn, self.txt_mlp), (img, self.img_mod, self.img_attn, self.img_mlp))
        mods = [mod(v) for _, mod, _, _ in streams]
        qkv = [
            attn((1 + scale) * _normalise(x) + shift)
            for (x, _, attn, _), (shift, scale, *_) in zip(streams, mods, strict=True)
        ]
        q, k, values = (jnp.concatenate(part, axis=1) for part in zip(*qkv, strict=True))
        split = jnp.split(attention(_rotate(q, cos, sin), _rotate(k, cos, sin), values), [txt.shape[1]], axis=1)
        out = []
        for (x, _, attn, mlp), (*_, gate1, shift2, scale2, gate2), seen in zip(streams, mods, split, strict=True):
            x = x + gate1 * attn.proj(seen)
            out.append(x + gate2 * mlp((1 + scale2) * _normalise(x) + shift2))
        return out[1], out[0]


class SingleBlock(nnx.Module):
    """Attention and MLP in parallel over all tokens, with one projection in and one out."""

    def __init__(self, config: FlowConfig, layers: TorchLayers):
        width, self.heads = config.width, config.heads
        self.linear1 = layers.linear(width, 3 * width + config.hidden)
        self.linear2 = layers.linear(width + config.hidden, width)
        self.norm = QKNorm(width // config.heads, layers)
        self.modulation = Modulation(3, config, layers)

    def __call__(self, x: Array, v: Array, cos: Array, sin: Array) -> Array:
        """[B, N, width], [B, width] -> [B, N, width]."""
        shift, scale, gate = self.modulation(v)
        qkv, hidden = jnp.split(self.linear1((1 + scale) * _normalise(x) + shift), [3 * x.shape[-1]], axis=-1)
        q, k, values = split_qkv(qkv, self.heads)
        q, k = self.norm(q, k)
        seen = attention(_rotate(q, cos, sin), _rotate(k, cos, sin), values)
        return x + gate * self.linear2(jnp.concatenate([seen, ACTIVATIONS["gelu_tanh"](hidden)], axis=-1))


class LastLayer(nnx.Module):
    """Modulated LayerNorm and the projection to velocities."""

    def __init__(self, config: FlowConfig, layers: TorchLayers):
        self.linear = layers.linear(config.width, config.in_channels, config.zero_out)
        self.adaLN_modulation = layers.linear(config.width, 2 * config.width, config.zero_out)

    def __call__(self, x: Array, v: Array) -> Array:
        """[B, N, width], [B, width] -> [B, N, in_channels]."""
        shift, scale = jnp.split(self.adaLN_modulation(jax.nn.silu(v))[:, None], 2, axis=-1)
        return self.linear((1 + scale) * _normalise(x) + shift)


class Flow(nnx.Module):
    """The transformer with random weights; `remat` recomputes each block in the backward pass, others as `Layers`."""

    def __init__(self, config: FlowConfig, *, rngs: Keys, dtype=jnp.float32, param_dtype=jnp.float32, remat=False):
        layers, width = TorchLayers(rngs, dtype, param_dtype), config.width
        self.config, self.dtype, self.remat = config, dtype, remat
        self.img_in = layers.linear(config.in_channels, width)
        self.time_in = Embedder(_CODE, width, layers)
        self.guidance_in = Embedder(_CODE, width, layers)
        self.vector_in = Embedder(config.vector_dim, width, layers)
        self.txt_in = layers.linear(config.text_dim, width)
        self.double_blocks = nnx.List(DoubleBlock(config, layers) for _ in range(config.double_blocks))
        self.single_blocks = nnx.List(SingleBlock(config, layers) for _ in range(config.single_blocks))
        self.final_layer = LastLayer(config, layers)

    def __call__(
        self, x: Array, t: Array, guidance: Array, vector: Array, text: Array, grid: tuple, freqs=None, seen=None
    ) -> Array:
        """The velocity at noisy latents, [B, h * w, in_channels], in `dtype`; the arguments are packed latents of this
        shape in raster order, times in [0, 1], 1 being noise, and strengths of guidance [B], the pooled condition [B,
        vector_dim], text tokens [B, T, text_dim], and `grid` (h, w). `freqs` are those of `timestep_code`; `seen` is
        called with the name and value of each intermediate result, while this is traced."""
        seen = seen or (lambda name, value: None)
        parts = {
            "time_in": self.time_in(timestep_code(t, freqs).astype(self.dtype)),
            "guidance_in": self.guidance_in(timestep_code(guidance, freqs).astype(self.dtype)),
            "vector_in": self.vector_in(vector.astype(self.dtype)),
        }
        v = sum(parts.values())
        img, txt = self.img_in(x.astype(self.dtype)), self.txt_in(text.astype(self.dtype))
        for name, value in {**parts, "img_in": img, "txt_in": txt}.items():
            seen(name, value)
        cos, sin = (jnp.asarray(a) for a in rotations(self.config, grid, text.shape[1]))
        for i, block in enumerate(self.double_blocks):
            img, txt = call(block, img, txt, v, cos, sin, remat=self.remat)
            seen(f"double{i}.img", img)
            seen(f"double{i}.txt", txt)
        joint = jnp.concatenate([txt, img], axis=1)
        for i, block in enumerate(self.single_blocks):
            joint = call(block, joint, v, cos, sin, remat=self.remat)
            seen(f"single{i}", joint)
        return self.final_layer(joint[:, text.shape[1] :], v)


def pack(latents: Array) -> Array:
    """2x2 patches as tokens in raster order, [B, 2h, 2w, C] -> [B, h * w, 4C]. Channel 4c + 2dy + dx of token (i, j) is
    channel c of the latents at (2i + dy, 2j + dx)."""
    b, h, w, c = latents.shape
    x = latents.reshape(b, h // 2, 2, w // 2, 2, c)  # [B, i, dy, j, dx, c]
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(b, (h // 2) * (w // 2), 4 * c)
