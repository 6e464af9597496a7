"""Vision towers against open_clip's VisionTransformer and timm's, on random weights; dense tokens."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from helpers import abstract_mesh, close, filled, refused
from specs import DINOV2, EVA02, QUICK, SIGLIP, TOWERS
from torch_towers import checkpoint, checkpoint_name, torch_features, torch_tower

from diva_jax.common.errors import UserError
from diva_jax.models import backbones
from diva_jax.models.backbones import Spec, build, eva02
from diva_jax.models.backbones.shared.transformer import VARIANTS
from diva_jax.models.layers import Keys
from diva_jax.weights import clip
from diva_jax.weights.names import assign, to_torch

# One spec for each architecture.
EACH = {"clip": QUICK, "siglip": SIGLIP, "eva02": EVA02, "dinov2": DINOV2}


def abstract(spec: Spec, **kw):
    return nnx.eval_shape(lambda: build(spec, rngs=Keys(0), **kw))


def load(spec: Spec, tower, **kw):
    return filled(abstract(spec, **kw), checkpoint(spec, tower), clip.table("vision", spec))


def images_for(spec: Spec, count: int = 3) -> np.ndarray:
    rng = np.random.default_rng(7)
    return rng.standard_normal((count, spec.image_size, spec.image_size, 3)).astype(np.float32)


def channels_first(images, dtype=torch.float32):
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(dtype)


def probes(spec: Spec, count: int = 3):
    """Fixed random directions, for a scalar loss that depends on all tokens."""
    rng = np.random.default_rng(8)
    shapes = (count, spec.patches, spec.embed_dim), (count, spec.embed_dim)
    return tuple(rng.standard_normal(s).astype(np.float32) for s in shapes)


def value_and_grads(spec: Spec, remat: bool = False):
    """The model's state, and the function state, images -> ((loss, (tokens, pooled)), gradient)."""
    a, b = probes(spec)
    graph, state = nnx.split(load(spec, torch_tower(spec), remat=remat))

    def loss(state, images):
        tokens, pooled = nnx.merge(graph, state).encode(images)
        return jnp.sum(tokens * a) + jnp.sum(pooled * b), (tokens, pooled)

    return state, jax.value_and_grad(loss, has_aux=True)


def pooling_joined(gradients: dict) -> dict:
    """Returns gradients with those of an attention pooling's inputs as one: the queries' and the latent's are small, as
    a common offset of the keys cancels in them, and have the rounding of the sums that cancel."""
    parts = {}
    for name in sorted(gradients):
        joined = re.search(r"attn_pool\W+(latent|q|kv)\b", str(name))
        parts.setdefault("inputs of attn_pool" if joined else name, []).append(np.ravel(gradients[name]))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


@functools.cache
def ours(spec: Spec):
    """Features and gradients of the fixed loss in float32, one program for all tests of a spec."""
    state, step = value_and_grads(spec)
    return jax.jit(step)(state, images_for(spec))


@pytest.mark.parametrize("spec", TOWERS.values(), ids=TOWERS)
def test_features_and_gradients_equal_the_original(spec):
    tower = torch_tower(spec)
    (_, (tokens, pooled)), grads = ours(spec)
    want_tokens, want_pooled = torch_features(tower, channels_first(images_for(spec)))
    assert tokens.shape == (3, spec.patches, spec.embed_dim) and pooled.shape == (3, spec.embed_dim)
    close(tokens, want_tokens.detach(), 2e-5, "tokens")
    close(pooled, want_pooled.detach(), 2e-5, "pooled")
    a, b = map(torch.from_numpy, probes(spec))
    ((want_tokens * a).sum() + (want_pooled * b).sum()).backward()
    want = {checkpoint_name(spec, k): p.grad.numpy() for k, p in tower.named_parameters()}
    found = to_torch(grads, clip.table("vision", spec))
    assert {n: g.shape for n, g in found.items()} == {n: g.shape for n, g in want.items()}
    found, want = pooling_joined(found), pooling_joined(want)
    for name in want:
        close(found[name], want[name], 2e-5, name)


@pytest.mark.parametrize("spec", EACH.values(), ids=EACH)
def test_remat_reaches_every_block(spec):
    blocks = []
    for remat in (False, True):
        state, step = value_and_grads(spec, remat)
        blocks.append(str(jax.make_jaxpr(step)(state, images_for(spec))).count(" remat"))
    assert blocks[0] == 0 and blocks[1] >= spec.layers


@pytest.mark.parametrize("spec", EACH.values(), ids=EACH)
def test_float64_is_float64_throughout(spec):
    """Float64 shows a wrong epsilon or a cast to float32, which are small in float32."""
    tower, images = torch_tower(spec).double(), images_for(spec)
    if rope := getattr(tower, "rope", None):  # timm computes its angles in float32.
        rope.pos_embed = torch.from_numpy(np.hstack([t[1:] for t in eva02.rotary_table(spec.grid, rope.dim)]))
    with jax.enable_x64(True), jax.sharding.use_abstract_mesh(abstract_mesh("cpu")):
        vision = load(spec, tower, dtype=jnp.float64, param_dtype=jnp.float64)
        tokens, pooled = jax.jit(vision.encode)(jnp.asarray(images, jnp.float64))
        assert tokens.dtype == pooled.dtype == jnp.float64
        tokens, pooled = np.asarray(tokens), np.asarray(pooled)
    with torch.no_grad():
        want_tokens, want_pooled = torch_features(tower, channels_first(images, torch.float64))
    close(tokens, want_tokens, 1e-13)
    close(pooled, want_pooled, 1e-13)


@pytest.mark.parametrize("spec", TOWERS.values(), ids=TOWERS)
def test_table_is_strict(spec):
    source, table, model = checkpoint(spec, torch_tower(spec)), clip.table("vision", spec), abstract(spec)
    known = ["logit_scale", "logit_bias", "attn_mask", "text.attn_mask", "positional_embedding", "text_projection"]
    known += ["transformer.resblocks.11.attn.in_proj_weight", "text.transformer.resblocks.0.mlp.c_fc.bias"]
    known += ["text.text_projection.weight", "token_embedding.weight", "ln_final.bias"]
    known = known if spec.has_text else ["visual.mask_token"]
    assign(model, source | {k: np.zeros(1) for k in known}, table)
    for stranger in ("visual.extra", "visual.proj.weight", "transformer.resblocks.0.ls_1.gamma", "head.weight"):
        refused(f"unknown: {stranger}", assign, model, source | {stranger: np.zeros(1)}, table)
    for name in source:
        with pytest.raises(UserError, match=f"missing: {name}"):
            assign(model, {k: v for k, v in source.items() if k != name}, table)


@pytest.mark.parametrize("spec", [SIGLIP, DINOV2], ids=["siglip", "dinov2"])
def test_embed_dim_is_the_width_where_there_is_no_projection(spec):
    refused("no projection", lambda: build(dataclasses.replace(spec, embed_dim=24), rngs=Keys(0)))


def test_an_unknown_architecture_is_named():
    with pytest.raises(UserError, match="backbone.arch='resnet' is no known architecture: use one of .*eva02"):
        build(dataclasses.replace(QUICK, arch="resnet"), rngs=Keys(0))


@pytest.mark.parametrize("spec", TOWERS.values(), ids=TOWERS)
def test_a_checkpoint_is_recognised_and_its_shapes_tell_the_sizes(spec):
    tensors = checkpoint(spec, torch_tower(spec))
    marked = [
        name for name, module in backbones.architectures().items() if f"visual.{module.CHECKPOINT.mark}" in tensors
    ]
    assert marked == [spec.arch]
    found = backbones.architecture(spec.arch).shapes(tensors)
    assert found.pop("image_size") == spec.grid * spec.patch_size
    assert set(found) >= {"arch", "patch_size", "width", "layers", "mlp_dim", "embed_dim"}
    assert found == {field: getattr(spec, field) for field in found}


SPECS = {"clip": QUICK, "siglip": SIGLIP}


def attend(weights, q, k, v, heads):
    """The variants written out: [B, N, D] thrice -> [B, N, D]."""
    b, n, d = q.shape

    def split(x):
        return x.reshape(b, n, heads, d // heads).transpose(1, 2)

    def softmax(a, c):
        return (split(a) @ split(c).transpose(-1, -2) / (d // heads) ** 0.5).softmax(-1)

    table = {
        "plain": lambda: softmax(q, k),
        "maskclip": lambda: torch.eye(n).expand(b, heads, n, n),
        "sclip": lambda: softmax(q, q) + softmax(k, k),
        "clearclip": lambda: softmax(q, q),
    }[weights]()
    return (table @ split(v)).transpose(1, 2).reshape(b, n, d)


def clip_tokens(tower, images, last, spec):
    x = tower._embeds(images)
    *before, block = tower.transformer.resblocks
    for one in before:
        x = one(x)
    q, k, v = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)
    y = block.attn.out_proj(attend(last, q, k, v, spec.heads))
    if last != "clearclip":
        y = x + y
        y = y + block.mlp(block.ln_2(y))
    return (tower.ln_post(y) @ tower.proj)[:, 1:]


def siglip_tokens(tower, images, last, spec):
    x = tower._pos_embed(tower.patch_embed(images))
    *before, block = tower.blocks
    for one in before:
        x = one(x)
    q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)
    y = block.attn.proj(attend(last, q, k, v, spec.heads))
    if last != "clearclip":
        y = x + y
        y = y + block.mlp(block.norm2(y))
    y, pool = tower.norm(y), tower.attn_pool
    y = pool.proj(pool.kv(y).chunk(2, dim=-1)[1])
    return y + pool.mlp(pool.norm(y))


@pytest.mark.parametrize("last", VARIANTS)
@pytest.mark.parametrize("name", SPECS)
def test_tokens_equal_torchs(name, last):
    spec = SPECS[name]
    tower = torch_tower(spec).eval()
    abstract = nnx.eval_shape(lambda: build(spec, rngs=Keys(0)))
    ours = filled(abstract, checkpoint(spec, tower), clip.table("vision", spec))
    images = np.random.default_rng(3).standard_normal((2, spec.image_size, spec.image_size, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = clip_tokens if name == "clip" else siglip_tokens
        want = theirs(tower, torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), last, spec).numpy()
    got = ours.encode_dense(images, last)
    assert got.shape == (2, spec.patches, spec.embed_dim)
    close(got, want, 1e-5)
    if last == "plain" and name == "clip":
        close(ours.encode(images).tokens, want, 1e-5)
