"""What holds for every objective and its step: devices, accumulation, and what is refused."""

import json
import re
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import small
from helpers import close, refused
from specs import DINOV2

from diva_jax import config
from diva_jax.common import fields
from diva_jax.training import step


def small_adapters(p):
    return {n: 0.05 * a if n.endswith("lora/b") else a for n, a in small.random_arrays(p).items()}


# Objective -> the fields of its config, and those on eight devices alone.
DEVICES = json.loads(Path(__file__).with_name("devices.json").read_text())


def tupled(value):
    return tuple(map(tupled, value)) if isinstance(value, list) else value


def config_of(name: str, fields):
    """The small config of an objective with these fields, or the default one of a tuple's backbone and diffusion."""
    if isinstance(fields, tuple):
        return config.default(*fields, objective=name)
    return small.with_fields(getattr(small, f"{name}_config")().unlock(), {n: tupled(v) for n, v in fields.items()})


@pytest.mark.parametrize("name", DEVICES)
def test_a_step_changes_what_it_trains_alone_on_any_devices(name):
    """It is traced once, and the optimizer holds nothing else."""
    (_, fields, more), arrays = DEVICES[name].values(), small_adapters if name == "dcr" else small.random_arrays
    chex.clear_trace_counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "train_step", chex.assert_max_traces(step.train_step, n=1))
        alone = small.train(config_of(name, fields), 3, 1, arrays)
    before, after, p = arrays(alone.program), alone.states[-1], alone.program
    assert after["params"].keys() == set(p.trained) == before.keys() - alone.frozen.keys()
    assert not [n for n, a in alone.frozen.items() if not np.array_equal(a, before[n])]
    assert not [n for n, a in after["params"].items() if np.array_equal(a, before[n])]
    ends = [path[-1] for path, _ in jax.tree_util.tree_leaves_with_path(after["opt"])]
    assert {end.key for end in ends if isinstance(end, jax.tree_util.DictKey)} == set(p.trained)
    shared = small.train(config_of(name, fields | more), 3, 8, arrays)
    chex.assert_trees_all_close(shared.metrics, alone.metrics, rtol=3e-5)
    p = shared.program
    if p.config.mesh.fsdp > 1:
        assert any("fsdp" in p.arrays[n].sharding.spec for n in p.trained)
        assert any("fsdp" in p.arrays[n].sharding.spec for n in shared.frozen) == p.config.mesh.shard_frozen
    if p.config.ema.decay:
        for kind in ("params", "ema"):
            for n, a in after[kind].items():
                close(shared.states[-1][kind][n], a, 1e-3, n)
        assert all(p.abstract_state(0)["ema"][n].sharding == p.arrays[n].sharding for n in p.trained)


def choices(name: str) -> list:
    """(path, value) of every value that a field of an objective's own section may have, if it is one of few."""
    declared, there = config.declared(name), fields.flatten(config_of(name, {}))
    own = {path: f for path, f in declared.items() if path.startswith(f"{name}.") and path in there}
    values = {path: f.rule.values if f.rule else isinstance(f.default, bool) * (True, False) for path, f in own.items()}
    return [(path, value) for path in own for value in values[path]]


@pytest.mark.parametrize("latents", ["", "a folder"])
@pytest.mark.parametrize("name", DEVICES)
def test_every_objective_takes_every_term(name, latents):
    c = config_of(name, {}).unlock()
    c.data.latents = latents
    terms = {"anchor", "relation"} | ({"contrast"} if c.backbone.text.width else set())
    for term in terms:
        c[term].weight = 0.5
    p = small.program(c)
    found = p.objective
    assert terms <= (found.inputs if latents else found.pretrained()).keys() and terms <= found.cacheable.keys()
    assert set(found.pretrained()) <= {n.split("/")[0] for n in p.arrays}


@pytest.mark.slow
@pytest.mark.parametrize("name", DEVICES)
def test_every_choice_of_an_objective_can_be_differentiated(name, tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps(["ring", "cross", "star", "heart"]))
    for path, value in choices(name):
        c = config_of(name, {}).unlock()
        if name == "judge":
            c.judge.classes = str(tmp_path / "classes.json")
        c.update_from_flattened_dict({path: value})
        assert small.program(c).flops().total() > 0, (path, value)


REFUSED = json.loads(Path(__file__).with_name("refused.json").read_text())
REFUSED += [(name, (DINOV2,), "dinov2 backbone has") for name in ("judge", "comclip", "smartclip")]
REFUSED.append(("unclip", ("siglip_so400m", "unclip_l"), "width 768, but those of .* have 1152"))


@pytest.mark.parametrize("name, fields, says", REFUSED)
def test_what_does_not_fit_is_one_sentence(name, fields, says):
    """Before anything is loaded, of shapes; test_config.py has the rules of each field."""
    c = config_of(name, fields)
    refused(says, lambda: config.validate(c, 1) or small.program(c))


@pytest.mark.parametrize("fields, exact", [({}, True), ({"remat": "all"}, True), ({"dtype": "bfloat16"}, False)])
def test_remat_and_precision_reach_the_loss(fields, exact):
    p = small.program(small.diva_config(**fields))
    batch = {n: a for n, a in p.abstract_batch().items() if n != "row"}
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 8))
    with jax.default_matmul_precision(None), p.tracing():
        traced = jax.make_jaxpr(lambda arrays, *given: p.skeleton.merge(arrays).loss(*given)[0])(p.arrays, batch, keys)
    assert (str(traced).count(" remat") > 10) == (fields.get("remat") == "all")
    products = re.findall(r"dot_general\[|conv_general_dilated\[", str(traced))
    assert (str(traced).count("(Precision.HIGHEST") == len(products) > 10) == exact
