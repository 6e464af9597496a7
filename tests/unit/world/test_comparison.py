"""The statistics of the experiment can say no."""

import numpy as np
import pytest
from helpers import refused
from PIL import Image

from diva_jax import config, objectives, world
from diva_jax.common.errors import UserError
from diva_jax.world import arms, comparison, criteria, endpoints, experiment

TESTS = sorted({test for e in endpoints.ENDPOINTS.values() for test in e.tests})


def row(arm: str, seed: int, share: float, rng) -> dict:
    """A run of which a share of the items is right."""
    found = {name: (rng.random(150) < share).astype(float) for name in TESTS}
    return experiment.row(arm, seed, 8, {"images": 8, "early": 4}, found, drift=0.0)


def rows(shares: dict[str, float], seeds: int = 5, draw: int = 0) -> list[dict]:
    rng = np.random.default_rng(draw)
    return [row(arm, s, share, rng) for arm, share in shares.items() for s in range(1 if arm == "untuned" else seeds)]


def test_an_arm_that_is_as_good_as_its_control_is_not_claimed():
    shares = {"untuned": 0.4, "diva": 0.55, "diva_control": 0.55}
    found = comparison.compare(rows(shares, draw=1))["diva"]
    assert found.untuned[endpoints.SEEN].sign == 1 and found.control[endpoints.SEEN].sign == 0
    assert "than its control: no difference shown" in comparison.verdict("diva", found)
    claims = 0  # Of draws without an effect; 95% intervals of each kind alone would claim one in twenty.
    for draw in range(20):
        runs = rows(shares, draw=draw)
        control, tuned = ([r for r in runs if r["arm"] == arm] for arm in ("diva_control", "diva"))
        claims += comparison.difference(control, tuned, endpoints.SEEN).sign != 0
    assert claims <= 3


def test_an_arm_above_both_and_one_below(tmp_path):
    shares = {"untuned": 0.4, "labels": 0.7, "judge_control": 0.42, "diva": 0.15, "diva_control": 0.42}
    found = comparison.compare(rows(shares))
    assert comparison.verdict("labels", found["labels"]) == "sees more; than its control: sees more; names better"
    assert comparison.verdict("diva", found["diva"]).startswith("sees less; than its control: sees less; names -")
    text = comparison.markdown(found)
    score = found["labels"].scores[endpoints.SEEN]
    assert abs(score - 70) < 5 and f"| `labels` | 5 | {score:.1f} |" in text and "seeds [" in text
    comparison.write_pareto(found, tmp_path / "pareto.png")
    assert Image.open(tmp_path / "pareto.png").width == 1440
    assert {c.holds for c in criteria.of_labels(rows(shares))} == {True}
    assert False in {c.holds for c in criteria.of_labels(rows(shares | {"labels": 0.5}))}


def test_nothing_is_claimed_without_the_control_or_with_one_seed():
    alone = comparison.compare(rows({"untuned": 0.4, "diva": 0.6}))
    assert "its control was not run" in comparison.verdict("diva", alone["diva"])
    single = comparison.compare(rows({"untuned": 0.4, "diva": 0.9, "diva_control": 0.1}, seeds=1))["diva"]
    assert single.untuned[endpoints.SEEN].sign == 0 == single.control[endpoints.SEEN].sign
    assert "nothing can be claimed" in comparison.verdict("diva", single)


@pytest.mark.parametrize("name", [n for n in arms.ARMS if n != "untuned"])
def test_every_arm_has_a_valid_config_and_the_same_budget(name):
    arm = arms.find(name)
    c = arms.arm_config(arm, 2, arms.Budget(1600, 16), "x")
    config.validate(c, 1)
    last = objectives.stages(c)[-1]
    assert last.end - last.start == c.steps == 100 and c.seed == 2
    assert not arm.control or arm.control in arms.ARMS
    if arm.teacher == arms.RANDOM:
        assert '"source": "x"' in c.to_json()
    if arm.control:
        control = arms.arm_config(arms.find(arm.control), 2, arms.Budget(1600, 16), "x")
        assert control.to_json() != c.to_json()


def test_fields_of_an_arm_can_be_changed_by_its_name():
    assert arms.find("diva:optim.lr=1e-3:anchor.weight=0.5").fields["optim.lr"] == 1e-3
    refused("give each field a number", arms.find, "diva:optim.lr=high")


def test_results_that_were_cut_off_and_unknown_arms(tmp_path):
    path = tmp_path / experiment.RESULTS
    path.write_text('{"arm": "diva", "seed": 0}\n{"arm": "di')
    assert experiment.read(path) == [{"arm": "diva", "seed": 0}]
    path.write_text('{"arm"\n{"arm": "diva"}\n')
    refused("line 1 is no JSON", experiment.read, path)
    with pytest.raises(UserError, match="--arms has no_such_arm"):
        experiment.experiment(tmp_path / "a", ["no_such_arm"], [0], arms.Budget(), 1)


@pytest.mark.parametrize("out", [None, "", "gs://bucket/x", "a_file", "a_file/x"])
def test_commands_are_told_which_folders_they_cannot_use(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("")
    with pytest.raises(UserError, match="^--out=.* give (one, e.g. --out=runs/x|another one)$"):
        world.folder(out, "runs/x")
    assert str(world.folder("runs/x", "runs/x")) == "runs/x"
