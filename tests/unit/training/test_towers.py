"""Tests of `Towers`: what an objective's towers need, which leaves are passed through, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx

from diva_jax.common.errors import UserError
from diva_jax.models import adapters, backbones
from diva_jax.models.layers import Keys, abstract
from diva_jax.training import partition, towers

LORA = adapters.Lora(rank=2, targets=r"blocks/0/attn/qkv|proj")


class Method(nnx.Module):
    """A vision tower with adapters, a scale that depends on two parameters, and a part that no tower needs."""

    def __init__(self, rngs, spec=small.SPEC):
        self.vision = backbones.build(spec, rngs=rngs)
        adapters.adapt(self.vision, LORA, rngs)
        self.bias, self.scale = nnx.Param(jnp.float32(2.0)), nnx.Param(jnp.float32(3.0))
        self.head = nnx.Linear(3, 4, rngs=rngs)

    def towers(self):
        return {"vision": adapters.merge(self.vision), "logit_scale": nnx.Param(self.scale[...] * self.bias[...])}


@pytest.fixture(scope="module")
def method():
    module = Method(Keys(0))
    for i, (_, m) in enumerate(nnx.iter_modules(module)):
        if isinstance(m, adapters.Update):
            m.b[...] = jax.random.normal(jax.random.key(i), m.b.shape)
    skeleton, arrays = partition.disassemble(module)
    return module, arrays, towers.Towers(skeleton, arrays)


def test_needs_are_found_by_tracing(method):
    _, arrays, found = method
    assert found.needs("vision") == {n for n in arrays if n.startswith("vision/")}
    assert found.needs("logit_scale") == {"bias", "scale"}
    assert {t: set(leaves) for t, leaves in found.shapes.items() if t != "vision"} == {"logit_scale": {"logit_scale"}}


def test_towers_from_what_they_need_alone(method):
    module, arrays, found = method
    flat = found({n: arrays[n] for n in found.needs("vision")}, ["vision"])
    assert set(flat) == {"vision"}
    want = partition.disassemble(adapters.merge(module.vision))[1]
    assert flat["vision"].keys() == want.keys()
    for name, array in flat["vision"].items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(want[name]), err_msg=name)
    merged = {"blocks/0/attn/qkv/kernel", "proj/matrix"}
    for name in set(want) - merged:
        assert flat["vision"][name] is arrays[f"vision/{name}"], f"{name} was copied"
    assert float(found(arrays)["logit_scale"]["logit_scale"]) == 6.0


def test_another_tower_than_the_backbones_is_refused(method):
    *_, found = method
    found.check(small.SPEC)
    with pytest.raises(UserError, match="the vision tower of the objective is not that of config.backbone.*blocks/2"):
        found.check(dataclasses.replace(small.SPEC, layers=3))

    def towers_of(result):
        module = abstract(lambda rngs: Method(rngs))
        other = object.__new__(type("Other", (Method,), {"towers": result}))
        vars(other).update(vars(module))
        return towers.Towers(*partition.disassemble(other))

    with pytest.raises(UserError, match="towers.. must return the plain tower, with adapters merged"):
        towers_of(lambda self: {"vision": self.vision}).check(small.SPEC)
    with pytest.raises(UserError, match="returns 'audio': return only vision, text, logit_scale and logit_bias"):
        towers_of(lambda self: {"audio": self.head}).check(small.SPEC)
