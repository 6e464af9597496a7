"""Low-rank adapters: values, what is trained, merging; the towers of an objective, and what they need."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx
from helpers import close, refused
from specs import TEACHER

from diva_jax.models import adapters, backbones
from diva_jax.models.layers import Keys, abstract
from diva_jax.training import partition

ALL = r"blocks/\d+/(attn/(qkv|proj)|mlp/fc[12])|proj"


def randomised(module, scale=1.0):
    for i, (_, m) in enumerate(nnx.iter_modules(module)):
        if isinstance(m, adapters.Update):
            m.b[...] = scale * jax.random.normal(jax.random.key(i), m.b.shape)
    return module


def adapted(spec, **lora):
    tower = backbones.build(spec, rngs=Keys(0))
    adapters.adapt(tower, adapters.Lora(**lora), Keys(1))
    return tower


def images(spec, count=3):
    return jax.random.normal(jax.random.key(9), (count, spec.image_size, spec.image_size, 3))


@pytest.mark.parametrize("spec", [small.SPEC, TEACHER], ids=["vit", "siglip"])
def test_new_adapters_change_nothing_and_merged_ones_compute_the_same(spec):
    plain, x = backbones.build(spec, rngs=Keys(0)), images(spec)
    tower = adapted(spec, rank=3, alpha=7.0, targets=ALL + r"|attn_pool/(q|kv|mlp/fc[12])")
    np.testing.assert_array_equal(tower.encode(x).pooled, plain.encode(x).pooled)
    assert 0.9 < spec.width**0.5 * jnp.abs(tower.blocks[0].mlp.fc1.lora.a[...]).max() <= 1
    merged = adapters.merge(randomised(tower, 0.3))
    for ours, want in zip(merged.encode(x), tower.encode(x), strict=True):
        close(ours, want, 2e-6)
    assert not np.allclose(tower.encode(x).pooled, plain.encode(x).pooled, rtol=1e-2)
    shapes = [{n: a.shape for n, a in partition.disassemble(m)[1].items()} for m in (merged, plain)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("fused", ["qkv", "qv", "k"])
def test_fused_projections_have_an_adapter_for_each_part(fused):
    """Compares with W + (alpha / rank) A B, computed for each part."""
    tower = randomised(adapted(small.SPEC, rank=2, alpha=3.0, targets=r"blocks/1/attn/qkv", fused=fused), 0.3)
    layer, width = tower.blocks[1].attn.qkv, small.SPEC.width
    want = np.asarray(layer.kernel[...]).copy()
    for i, letter in enumerate(fused):
        part = "qkv".index(letter)
        want[:, part * width : (part + 1) * width] += 1.5 * np.asarray(layer.lora.a[i]) @ np.asarray(layer.lora.b[i])
    merged = adapters.merge(tower).blocks[1].attn.qkv
    np.testing.assert_allclose(merged.kernel[...], want, rtol=1e-5, atol=1e-6)
    x = jax.random.normal(jax.random.key(2), (2, 5, width))
    np.testing.assert_allclose(layer(x), x @ want + layer.bias[...], rtol=1e-4, atol=1e-5)
    assert type(tower.blocks[0].attn.qkv) is nnx.Linear and type(merged) is nnx.Linear


def test_dropout_depends_on_the_image_and_the_layer_alone():
    tower = randomised(adapted(small.SPEC, rank=3, dropout=0.5, targets=ALL), 0.3)
    x, keys = images(small.SPEC, 4), jax.random.split(jax.random.key(4), 4)

    def encode(x, keys):
        with adapters.dropout(keys):
            return np.asarray(tower.encode(x).pooled)

    dropped, plain = encode(x, keys), np.asarray(tower.encode(x).pooled)
    assert not np.allclose(dropped, plain, rtol=1e-2)
    order = np.asarray([2, 0, 3, 1])
    np.testing.assert_allclose(encode(x[order], keys[order]), dropped[order], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(tower.encode(x).pooled), plain)  # Outside of the context.
    layer = tower.blocks[0].attn.qkv.lora
    masked = layer._dropped(jnp.ones((2000, small.SPEC.width)), jax.random.split(jax.random.key(0), 2000))
    assert masked.mean() == pytest.approx(1, abs=0.02) and set(np.unique(masked)) == {0.0, 2.0}
    assert not np.array_equal(masked[0], masked[1])  # q and k have different masks.


class Method(nnx.Module):
    """A vision tower with adapters, a scale that depends on two parameters, and a part that no tower needs."""

    def __init__(self, rngs, kind="merged"):
        self.kind, self.vision = kind, backbones.build(small.SPEC, rngs=rngs)
        adapters.adapt(self.vision, adapters.Lora(rank=2, targets=r"blocks/0/attn/qkv|proj"), rngs)
        self.bias, self.scale = nnx.Param(jnp.float32(2.0)), nnx.Param(jnp.float32(3.0))
        self.head = nnx.Linear(3, 4, rngs=rngs)

    def towers(self):
        if self.kind != "merged":
            return {"plain": {"vision": self.vision}, "audio": {"audio": self.head}}[self.kind]
        return {"vision": adapters.merge(self.vision), "logit_scale": nnx.Param(self.scale[...] * self.bias[...])}


@pytest.fixture(scope="module")
def method():
    module = randomised(Method(Keys(0)))
    skeleton, arrays = partition.disassemble(module)
    return module, arrays, partition.Towers(skeleton, arrays)


def test_towers_from_what_they_need_alone(method):
    module, arrays, found = method
    assert found.needs("vision") == {n for n in arrays if n.startswith("vision/")}
    assert found.needs("logit_scale") == {"bias", "scale"}
    assert {t: set(leaves) for t, leaves in found.shapes.items() if t != "vision"} == {"logit_scale": {"logit_scale"}}
    flat = found({n: arrays[n] for n in found.needs("vision") | found.needs("logit_scale")})
    assert set(flat) == {"vision", "logit_scale"} and float(flat["logit_scale"]["logit_scale"]) == 6.0
    want = partition.disassemble(adapters.merge(module.vision))[1]
    jax.tree.map(np.testing.assert_array_equal, dict(flat["vision"]), dict(want))
    for name in set(want) - {"blocks/0/attn/qkv/kernel", "proj/matrix"}:
        assert flat["vision"][name] is arrays[f"vision/{name}"], f"{name} was copied"


def test_another_tower_than_the_backbones_is_refused(method):
    *_, found = method
    found.check(small.SPEC)
    says = "the vision tower of the objective is not that of config.backbone.*blocks/2"
    refused(says, found.check, dataclasses.replace(small.SPEC, layers=3))
    for kind, says in (
        ("plain", "towers.. must return the plain tower, with adapters merged"),
        ("audio", "returns 'audio': return only vision, text, logit_scale and logit_bias"),
    ):
        made = abstract(lambda rngs, kind=kind: Method(rngs, kind))
        refused(says, partition.Towers(*partition.disassemble(made)).check, small.SPEC)
