"""Tests of what is asked of any objective: found by name, its config section, its stages, its sources."""

from types import SimpleNamespace

import pytest
import small

from diva_jax import config, objectives
from diva_jax.common.errors import UserError
from diva_jax.objectives import Stage
from diva_jax.training import load


def test_every_objective_has_a_config_that_is_valid():
    for name in objectives.names():
        c = config.default(small.SPEC, objective=name)
        assert objectives.section(name) in c and c.objective == name
        assert objectives.stages(c)[-1].end >= c.steps
        assert issubclass(objectives.find(name).Objective, objectives.Objective)


def stage(name, start, end):
    return Stage(name, start, end, 1e-3, ((".*", 1.0),))


@pytest.mark.parametrize(
    "found",
    [
        (),
        (stage("a", 1, 3),),
        (stage("a", 0, 3), stage("b", 4, 6)),
        (stage("a", 0, 3), stage("b", 2, 6)),
        (stage("a", 0, 0), stage("b", 0, 6)),
        (stage("a", 0, 3), stage("b", 3, 2)),
    ],
)
def test_stages_with_gaps_are_refused(found, monkeypatch):
    c = small.small_config()
    monkeypatch.setattr(objectives, "find", lambda name: SimpleNamespace(stages=lambda c: found))
    with pytest.raises(UserError, match="stages of config.objective=diva must follow one another"):
        objectives.stages(c)


def test_the_longest_prefix_owns_a_parameter_and_adapters_start_fresh():
    p = small.program(small.small_config())
    part = SimpleNamespace(fresh=(r"blocks/1/.*",))
    parts = {"vision": part, "vision/blocks": SimpleNamespace(fresh=()), "visual_proj/bias": SimpleNamespace(fresh=())}
    p.objective = SimpleNamespace(pretrained=lambda: parts)
    owners = load.owners(p)
    assert owners["vision/blocks/1/norm1/scale"] == "vision/blocks" and owners["vision/pos_embed"] == "vision"
    assert owners["visual_proj/bias"] == "visual_proj/bias" and "visual_proj/kernel" not in owners
    del parts["vision/blocks"]
    owners = load.owners(p)
    assert "vision/blocks/1/norm1/scale" not in owners and owners["vision/blocks/0/norm1/scale"] == "vision"
    parts["vison"] = part
    with pytest.raises(UserError, match=r"pretrained\(\) has 'vison', but parameters are named like"):
        load.owners(p)


def test_an_objective_without_its_section_is_refused():
    c = small.small_config()
    with c.unlocked():
        del c.diva
    with pytest.raises(UserError, match="config.objective=diva has no section config.diva"):
        config.validate(c, 1)
