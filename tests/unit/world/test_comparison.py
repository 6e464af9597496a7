"""The statistics of the experiment can say no."""

import numpy as np
import pytest
from PIL import Image

from diva_jax import config
from diva_jax.common.errors import UserError
from diva_jax.world import arms, comparison, experiment, gaps, scenes

FACTS = len(scenes.FACTS)


def row(arm: str, seed: int, share: float, rng) -> dict:
    """A run of which a share of the items is right."""
    hits = {"pairs": 40 * FACTS, "matches": 40 * FACTS, "zeroshot": 200}
    hits |= {"linear/a": 100, "linear/b": 60, "knn/a": 100, "knn/b": 60}
    found = {name: (rng.random(n) < share).astype(float) for name, n in hits.items()}
    scores = {m: 100 * share for m in (*comparison.METRICS, *(f"pairs/{f}" for f in scenes.FACTS))}
    items = {name: "".join(str(int(x)) for x in a) for name, a in found.items()}
    return {"arm": arm, "seed": seed, "scores": scores, "items": items}


def rows(shares: dict[str, float], seeds: int = 5, draw: int = 0) -> list[dict]:
    rng = np.random.default_rng(draw)
    return [row(arm, s, share, rng) for arm, share in shares.items() for s in range(1 if arm == "untuned" else seeds)]


def test_an_arm_that_is_as_good_as_its_control_is_not_claimed():
    shares = {"untuned": 0.4, "stages": 0.55, "shuffled": 0.55}
    found = comparison.compare(rows(shares, draw=1))
    assert found["stages"].untuned["pairs"].sign == 1 and found["stages"].control["pairs"].sign == 0
    assert comparison.verdict("stages", found["stages"]).endswith("not above its control")
    claims = 0  # Of draws without an effect; 95% intervals of each kind alone would claim one in twenty.
    for draw in range(20):
        runs = rows(shares, draw=draw)
        control, tuned = ([r for r in runs if r["arm"] == arm] for arm in ("shuffled", "stages"))
        claims += comparison.difference(control, tuned, "pairs").sign != 0
    assert claims <= 3


def test_an_arm_above_both_and_one_below(tmp_path):
    found = comparison.compare(
        rows({"untuned": 0.4, "stages": 0.6, "shuffled": 0.42, "diva": 0.2, "diva_shuffled": 0.42})
    )
    assert comparison.verdict("stages", found["stages"]) == (
        "more pairs than untuned, more matches, names better; above its control"
    )
    assert comparison.verdict("diva", found["diva"]).startswith("fewer pairs than untuned, fewer matches, names worse")
    text = comparison.markdown(found)
    assert "| `stages`: DIVA in two stages | 5 | 60.0 | 60.0 |" in text and "seeds [" in text
    older = rows({"untuned": 0.4, "stages": 0.6})
    for r in older:
        del r["scores"]["matches"], r["items"]["matches"]
    assert "matches" not in comparison.markdown(comparison.compare(older))
    comparison.write_pareto(found, tmp_path / "pareto.png")
    assert Image.open(tmp_path / "pareto.png").width == 1440


def test_nothing_is_claimed_without_the_control_or_with_one_seed():
    alone = comparison.compare(rows({"untuned": 0.4, "stages": 0.6}))
    assert "nothing can be claimed" in comparison.verdict("stages", alone["stages"])
    single = comparison.compare(rows({"untuned": 0.4, "stages": 0.9, "shuffled": 0.1}, seeds=1))
    assert single["stages"].untuned["pairs"].sign == 0 == single["stages"].control["pairs"].sign


@pytest.mark.parametrize("name", [n for n in arms.ARMS if n != "untuned"])
def test_every_arm_has_a_valid_config_and_the_same_budget(name):
    arm = arms.ARMS[name]
    c = arms.arm_config(arm, seed=2, steps=30, batch_size=40, random="x")
    config.validate(c, 1)
    own = c.genhancer.stage1_steps if arm.objective == "genhancer" else 0
    assert (experiment_steps(c) - own) * c.batch_size * arms.passes(c) == 30 * 40 and c.seed == 2
    assert not arm.control or arm.control in arms.ARMS
    if arm.teacher == arms.RANDOM:
        assert own == 1 or (c.kuea.teacher if "kuea" in c else c.diffusion).source == "x"
    if name.endswith("shuffled"):
        assert c[arm.objective].condition_of == "next"


def experiment_steps(c) -> int:
    from diva_jax import objectives

    return objectives.stages(c)[-1].end


def test_results_that_were_cut_off_and_unknown_arms(tmp_path):
    path = tmp_path / experiment.RESULTS
    path.write_text('{"arm": "diva", "seed": 0}\n{"arm": "di')
    assert experiment.read(path) == [{"arm": "diva", "seed": 0}]
    path.write_text('{"arm"\n{"arm": "diva"}\n')
    with pytest.raises(UserError, match="line 1 is no JSON"):
        experiment.read(path)
    with pytest.raises(UserError, match="--arms has no_such_arm"):
        experiment.experiment(tmp_path / "a", ["no_such_arm"], 1, {"steps": 3, "batch_size": 2, "pairs": 1})
    with pytest.raises(UserError, match="--batch_size=6 cannot be divided by the 4 passes"):
        experiment.experiment(tmp_path / "a", ["four_draws"], 1, {"steps": 3, "batch_size": 6, "pairs": 1})


def test_the_range_of_timesteps_begins_at_the_first_plain_gap():
    def r(low, gap, ends):
        return {"low": low, "high": low + 100, "gap": gap, "interval": ends}

    found = [r(0, 6.0, [-1.0, 13.0]), r(100, 2.0, [1.0, 3.0]), r(200, 9.0, [7.0, 11.0]), r(300, 30.0, [25.0, 35.0])]
    assert gaps.proposed(found) == (200, 400)
    assert gaps.proposed(found[:2]) is None
