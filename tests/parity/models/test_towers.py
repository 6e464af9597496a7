"""Vision and text towers against open_clip's and timm's, on random weights; dense tokens."""

import copy
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
from helpers import abstract_mesh, close, filled, refused, tensors
from specs import DINOV2, EVA02, GELU, METACLIP2, QUICK, SIGLIP, SIGLIP2, TOWERS
from torch_models import checkpoint, checkpoint_name, torch_features, torch_model, torch_tower

from diva_jax.models import backbones
from diva_jax.models.backbones import Spec, build, eva02
from diva_jax.models.backbones.shared import transformer
from diva_jax.models.backbones.shared.transformer import VARIANTS, Text
from diva_jax.models.layers import Keys
from diva_jax.weights import names
from diva_jax.weights.names import assign, to_torch


@dataclasses.dataclass(frozen=True)
class Tower:
    spec: Spec
    text: bool = False

    @property
    def table(self):
        return names.table("text" if self.text else "vision", self.spec)

    @functools.cached_property
    def theirs(self) -> torch.nn.Module:
        return torch_model(self.spec) if self.text else torch_tower(self.spec)

    def ours(self, **kw):
        abstract = nnx.eval_shape(lambda: (Text if self.text else build)(self.spec, rngs=Keys(0), **kw))
        return filled(abstract, tensors(self.theirs) if self.text else checkpoint(self.spec, self.theirs), self.table)

    @functools.cached_property
    def inputs(self) -> np.ndarray:
        """Images; or start, words, end and padding: a full-length text, an empty one, and some between."""
        spec, rng = self.spec, np.random.default_rng(7)
        if not self.text:
            return rng.standard_normal((3, spec.image_size, spec.image_size, 3)).astype(np.float32)
        ids, size = np.zeros((4, spec.text.context_length), np.int32), spec.text.vocab_size
        for row, words in zip(ids, (len(ids[0]) - 2, 0, 1, 6), strict=True):
            row[0], row[words + 1] = size - 2, spec.text.eos_id if spec.text.pool == "eos" else size - 1
            row[1 : words + 1] = rng.integers(3, size - 2, words)
        return ids

    @property
    def probes(self) -> tuple[np.ndarray, ...]:
        """Fixed random directions, for a scalar loss that depends on all outputs."""
        n, d, rng = len(self.inputs), self.spec.embed_dim, np.random.default_rng(8)
        shapes = [(n, d)] if self.text else [(n, self.spec.patches, d), (n, d)]
        return tuple(rng.standard_normal(s).astype(np.float32) for s in shapes)

    def encode(self, module, inputs) -> tuple:
        found = module.encode(inputs)
        return (found,) if self.text else tuple(found)

    def torch_encode(self, dtype=torch.float32) -> tuple:
        if self.text:
            return (self.theirs.encode_text(torch.from_numpy(self.inputs).long()),)
        return torch_features(self.theirs, torch.from_numpy(self.inputs.transpose(0, 3, 1, 2).copy()).to(dtype))

    def value_and_grads(self, **kw):
        """The model's state, and the function state, inputs -> ((loss, outputs), gradient)."""
        graph, state = nnx.split(self.ours(**kw))

        def loss(state, inputs):
            found = self.encode(nnx.merge(graph, state), inputs)
            return sum(jnp.sum(x * probe) for x, probe in zip(found, self.probes, strict=True)), found

        return state, jax.value_and_grad(loss, has_aux=True)


TEXTS = dict(quick_gelu=QUICK, gelu=GELU, siglip=SIGLIP, siglip2=SIGLIP2, metaclip2=METACLIP2, eva02=EVA02)
ALL = {name: Tower(spec) for name, spec in TOWERS.items()}
ALL |= {f"text of {name}": Tower(spec, text=True) for name, spec in TEXTS.items()}
# One for each architecture.
EACH = {name: ALL[name] for name in ("quick_gelu", "siglip", "eva02", "dinov2")}
EXACT = EACH | {name: ALL[name] for name in ("text of quick_gelu", "text of siglip", "text of eva02")}
each, everyone = (pytest.mark.parametrize("tower", of.values(), ids=of) for of in (EACH, ALL))
vision = pytest.mark.parametrize("tower", [ALL[n] for n in TOWERS], ids=TOWERS)


def pooling_joined(gradients: dict) -> dict:
    """Returns gradients with those of an attention pooling's inputs as one: the queries' and the latent's are small, as
    a common offset of the keys cancels in them, and have the rounding of the sums that cancel."""
    parts = {}
    for name in sorted(gradients):
        joined = re.search(r"attn_pool\W+(latent|q|kv)\b", str(name))
        parts.setdefault("inputs of attn_pool" if joined else name, []).append(np.ravel(gradients[name]))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


@everyone
def test_outputs_and_gradients_equal_the_original(tower):
    state, step = tower.value_and_grads()
    (_, found), grads = jax.jit(step)(state, tower.inputs)
    want = tower.torch_encode()
    assert [x.shape for x in found] == [x.shape for x in tower.probes]
    for ours, theirs in zip(found, want, strict=True):
        for one, other in zip(ours, theirs.detach(), strict=True):
            close(one, other, 2e-5)
    sum((x * torch.from_numpy(probe)).sum() for x, probe in zip(want, tower.probes, strict=True)).backward()
    parameters = {k: p.grad.numpy() for k, p in tower.theirs.named_parameters() if p.grad is not None}
    if not tower.text:
        parameters = {checkpoint_name(tower.spec, k): g for k, g in parameters.items()}
    found = to_torch(grads, tower.table)
    assert {n: g.shape for n, g in found.items()} == {n: g.shape for n, g in parameters.items()}
    found, want = pooling_joined(found), pooling_joined(parameters)
    for name in want:
        close(found[name], want[name], 2e-5, name)


@each
def test_remat_reaches_every_block_and_parts_of_the_batch_change_nothing(tower, monkeypatch):
    tower, blocks, results = copy.copy(tower), [], []
    vars(tower)["inputs"] = np.concatenate([tower.inputs, -tower.inputs])
    monkeypatch.setattr(transformer, "parts", lambda *shape: 3)
    for remat in (False, True):
        state, step = tower.value_and_grads(remat=remat)
        blocks.append(str(jax.make_jaxpr(step)(state, tower.inputs)).count(" remat"))
        results.append(jax.jit(step)(state, tower.inputs))
    assert blocks[0] == 0 and blocks[1] >= tower.spec.layers
    jax.tree.map(lambda one, other: close(one, other, 2e-5), *results)


@pytest.mark.parametrize("name", EXACT)
def test_float64_is_float64_throughout(name, monkeypatch):
    """Float64 shows a wrong epsilon or a cast to float32, which are small in float32."""

    def attend(q, k, v, *, is_causal, mask, implementation):
        """`jax.nn.dot_product_attention`, whose own softmax is in float32."""
        scores = jnp.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
        if is_causal:
            scores = jnp.where(jnp.tri(*scores.shape[-2:], dtype=bool), scores, -jnp.inf)
        return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(scores), v)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    tower = dataclasses.replace(EXACT[name])  # With modules of its own.
    rope = getattr(tower.theirs.double(), "rope", None)
    if rope:  # timm computes its angles in float32.
        rope.pos_embed = torch.from_numpy(np.hstack([t[1:] for t in eva02.rotary_table(tower.spec.grid, rope.dim)]))
    with jax.enable_x64(True):
        module = tower.ours(dtype=jnp.float64, param_dtype=jnp.float64)
        inputs = tower.inputs if tower.text else jnp.asarray(tower.inputs, jnp.float64)
        with jax.sharding.use_abstract_mesh(abstract_mesh("cpu")):
            found = jax.jit(functools.partial(tower.encode, module))(inputs)
        assert {x.dtype for x in found} == {jnp.dtype("float64")}
        found = [np.asarray(x) for x in found]
    with torch.no_grad():
        for ours, theirs in zip(found, tower.torch_encode(torch.float64), strict=True):
            close(ours, theirs, 1e-13)


@vision
def test_table_is_strict(tower):
    spec, model = tower.spec, nnx.eval_shape(lambda: build(tower.spec, rngs=Keys(0)))
    source, table = checkpoint(spec, tower.theirs), tower.table
    known = ["logit_scale", "logit_bias", "attn_mask", "text.attn_mask", "positional_embedding", "text_projection"]
    known += ["transformer.resblocks.11.attn.in_proj_weight", "text.transformer.resblocks.0.mlp.c_fc.bias"]
    known += ["text.text_projection.weight", "token_embedding.weight", "ln_final.bias"]
    known = known if spec.has_text else ["visual.mask_token"]
    assign(model, source | {k: np.zeros(1) for k in known}, table)
    for stranger in ("visual.extra", "visual.proj.weight", "transformer.resblocks.0.ls_1.gamma", "head.weight"):
        refused(f"unknown: {stranger}", assign, model, source | {stranger: np.zeros(1)}, table)
    for name in source:
        refused(f"missing: {name}", assign, model, {k: v for k, v in source.items() if k != name}, table)


def test_towers_that_there_are_not():
    for spec in (SIGLIP, DINOV2):
        refused("no projection", build, dataclasses.replace(spec, embed_dim=24), rngs=Keys(0))
    says = "backbone.arch='resnet' is no known architecture: use one of .*eva02"
    refused(says, build, dataclasses.replace(QUICK, arch="resnet"), rngs=Keys(0))
    for fails in (lambda: Text(DINOV2, rngs=Keys(0)), lambda: names.table("text", DINOV2)):
        refused("a dinov2 backbone has no text tower", fails)


@vision
def test_a_checkpoint_is_recognised_and_its_shapes_tell_the_sizes(tower):
    spec, found = tower.spec, checkpoint(tower.spec, tower.theirs)
    marks = {name: module.CHECKPOINT.mark for name, module in backbones.architectures().items()}
    assert [name for name, mark in marks.items() if f"visual.{mark}" in found] == [spec.arch]
    sizes = backbones.architecture(spec.arch).shapes(found)
    assert sizes.pop("image_size") == spec.grid * spec.patch_size
    assert set(sizes) >= {"arch", "patch_size", "width", "layers", "mlp_dim", "embed_dim"}
    assert sizes == {field: getattr(spec, field) for field in sizes}


def attend(variant, q, k, v, heads):
    """The variants of attention: [B, N, D] thrice -> [B, N, D]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    pairs = {"plain": [(q, k)], "maskclip": [], "sclip": [(q, q), (k, k)], "clearclip": [(q, q)]}[variant]
    found = sum(F.scaled_dot_product_attention(a, b, v) for a, b in pairs) if pairs else v
    return found.transpose(1, 2).flatten(2)


def dense_tokens(tower, images, last, spec):
    """Tokens [B, N, D] of open_clip's or timm's tower, whose last block attends in another way."""
    if spec.arch == "siglip":
        x, (*before, block) = tower._pos_embed(tower.patch_embed(images)), tower.blocks
        qkv, out, norm = lambda x: block.attn.qkv(block.norm1(x)), block.attn.proj, block.norm2
    else:
        x, (*before, block) = tower._embeds(images), tower.transformer.resblocks
        qkv = lambda x: F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)  # noqa: E731
        out, norm = block.attn.out_proj, block.ln_2
    x = torch.nn.Sequential(*before)(x)
    y = out(attend(last, *qkv(x).chunk(3, dim=-1), spec.heads))
    if last != "clearclip":
        y = x + y
        y = y + block.mlp(norm(y))
    if spec.arch == "vit":
        return (tower.ln_post(y) @ tower.proj)[:, 1:]
    y, pool = tower.norm(y), tower.attn_pool
    y = pool.proj(pool.kv(y).chunk(2, dim=-1)[1])
    return y + pool.mlp(pool.norm(y))


@pytest.mark.parametrize("last", VARIANTS)
@pytest.mark.parametrize("name", ["quick_gelu", "siglip"])
def test_dense_tokens_equal_torchs(name, last):
    tower = ALL[name]
    module, images = tower.ours(), torch.from_numpy(tower.inputs.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        want = dense_tokens(tower.theirs, images, last, tower.spec).numpy()
    close(module.encode_dense(tower.inputs, last), want, 1e-5)
    if last == "plain" and name == "quick_gelu":
        close(module.encode(tower.inputs).tokens, want, 1e-5)
