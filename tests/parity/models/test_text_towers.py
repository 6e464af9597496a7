"""Text towers against open_clip's CLIP.encode_text and CustomTextCLIP's, on random weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from eval_models import torch_model
from flax import nnx
from helpers import close, filled, refused, tensors
from specs import DINOV2, EVA02, GELU, METACLIP2, QUICK, SIGLIP, SIGLIP2

from diva_jax.models.backbones import Spec
from diva_jax.models.backbones.shared.transformer import Text
from diva_jax.models.layers import Keys
from diva_jax.weights import clip
from diva_jax.weights.names import to_torch

SPECS = {
    "quick_gelu": QUICK,
    "gelu": GELU,
    "siglip": SIGLIP,
    "siglip2": SIGLIP2,
    "metaclip2": METACLIP2,
    "eva02": EVA02,
}


def abstract(spec: Spec, **kw):
    return nnx.eval_shape(lambda: Text(spec, rngs=Keys(0), **kw))


def load(spec: Spec, model, **kw):
    return filled(abstract(spec, **kw), tensors(model), clip.table("text", spec))


def sentences(spec: Spec) -> np.ndarray:
    """Start, words, end and padding: a full-length one, an empty one, and some between."""
    text, rng = spec.text, np.random.default_rng(2)
    ids = np.zeros((4, text.context_length), np.int32)
    for row, words in zip(ids, (text.context_length - 2, 0, 1, 6), strict=True):
        row[0], row[words + 1] = text.vocab_size - 2, text.eos_id if text.pool == "eos" else text.vocab_size - 1
        row[1 : words + 1] = rng.integers(3, text.vocab_size - 2, words)
    return ids


@functools.cache
def ours(spec: Spec):
    """Embeddings, and gradients of a fixed loss, in float32: one program for all tests of a spec."""
    graph, state = nnx.split(load(spec, torch_model(spec)))

    def loss(state):
        embeddings = nnx.merge(graph, state).encode(sentences(spec))
        return jnp.sum(embeddings * probe(spec)), embeddings

    return jax.jit(jax.grad(loss, has_aux=True))(state)


def probe(spec: Spec) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((4, spec.embed_dim)).astype(np.float32)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_embeddings_and_gradients_equal_the_original(spec):
    model = torch_model(spec)
    grads, got = ours(spec)
    want = model.encode_text(torch.from_numpy(sentences(spec)).long())
    assert got.shape == (4, spec.embed_dim)
    for one, theirs in zip(got, want.detach(), strict=True):
        close(one, theirs, 2e-5)
    (want * torch.from_numpy(probe(spec))).sum().backward()
    want = {k: p.grad.numpy() for k, p in model.named_parameters() if p.grad is not None}
    found = to_torch(grads, clip.table("text", spec))
    assert set(found) == set(want)
    for name in want:
        close(found[name], want[name], 2e-5, name)


@pytest.mark.parametrize("spec", [QUICK, SIGLIP, EVA02], ids=["clip", "siglip", "eva02"])
def test_float64_is_float64_throughout(spec, monkeypatch):
    """Float64 shows a wrong epsilon or a cast to float32, which are small in float32."""

    def attend(q, k, v, *, is_causal, mask, implementation):
        """`jax.nn.dot_product_attention`, whose own softmax is in float32."""
        scores = jnp.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
        if is_causal:
            scores = jnp.where(jnp.tri(*scores.shape[-2:], dtype=bool), scores, -jnp.inf)
        return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(scores), v)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    model, ids = torch_model(spec).double(), sentences(spec)
    with jax.enable_x64(True):
        got = jax.jit(load(spec, model, dtype=jnp.float64, param_dtype=jnp.float64).encode)(ids)
        assert got.dtype == jnp.float64
        got = np.asarray(got)
    with torch.no_grad():
        want = model.encode_text(torch.from_numpy(ids).long())
    close(got, want, 1e-13)


def test_a_vision_encoder_alone_has_no_text_tower_and_pooling_is_known():
    for fails in (lambda: Text(DINOV2, rngs=Keys(0)), lambda: clip.table("text", DINOV2)):
        refused("a dinov2 backbone has no text tower", fails)
