"""Intervals, McNemar's test, what is right where images and texts meet, groups of runs, the best of checkpoints."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import trees
from helpers import refused
from scipy import stats as reference

from diva_jax.common.results_schema import Difference
from diva_jax.evals import ItemTask, Settings, Values, seeds, stats, weight_sets
from diva_jax.weights.origins import Place


def plain(values, strata=None, clusters=None):
    """scipy's interval of the mean over strata; a cluster, all of which are as large, is one value."""
    names = np.zeros(len(values)) if strata is None else strata
    parts = [values[names == n] for n in np.unique(names)]
    if clusters is not None:
        parts = [values.reshape(clusters.max() + 1, -1).mean(axis=1)]
    mean, options = lambda *p, axis: np.mean([x.mean(axis) for x in p], axis=0), dict(method="percentile", rng=1)
    return reference.bootstrap(parts, mean, n_resamples=4000, **options).confidence_interval


@pytest.mark.parametrize("kind", ["plain", "strata", "clusters", "shares"])
def test_interval_equals_plain_resampling(kind):
    rng, kw = np.random.default_rng(0), {}
    values = rng.random(90) if kind == "shares" else rng.random(90) < 0.3
    if kind == "strata":  # Unequal strata: the mean of their means is not the mean.
        kw["strata"] = np.repeat([0, 1, 2], (10, 20, 60))
        values = rng.random(90) < np.array([0.9, 0.5, 0.1])[kw["strata"]]
    if kind == "clusters":  # The items of a cluster are equal: the interval is wider than for single items.
        kw["clusters"] = np.repeat(np.arange(18), 5)
        values = (rng.random(18) < 0.4)[kw["clusters"]]
    ours, again, single = (stats.bootstrap(values, resamples=20_000, seed=0, **given) for given in (kw, kw, {}))
    np.testing.assert_allclose(ours, plain(values, **kw), atol=0.015)
    assert ours == again and (kind != "clusters" or ours[1] - ours[0] > 1.5 * (single[1] - single[0]))


@pytest.mark.parametrize("size, most", [(2, 0.98), (1, 1.0)])
def test_the_interval_of_a_mean_over_small_classes_holds_the_mean_of_the_classes(size, most):
    rng, labels, held = np.random.default_rng(1), np.repeat(np.arange(60), size), []
    for seed in range(250):
        share = rng.beta(2, 2, 60)
        low, high = stats.bootstrap(rng.random(len(labels)) < share[labels], resamples=300, seed=seed, strata=labels)
        held.append(low <= share.mean() <= high)
    assert 0.91 < np.mean(held) <= most


def test_exact_means_and_mcnemars_test():
    values = np.array([1e16, 1.0, -1e16] * 5)
    assert stats.mean(values) == stats.mean(values[::-1]) == 5 / 15
    assert stats.mean(np.array([1, 0, 1, 1]), np.array([0, 0, 0, 1])) == pytest.approx((2 / 3 + 1) / 2)
    for won, lost in ((0, 0), (3, 0), (5, 2), (4, 4), (1, 9)):
        before = np.array([False] * won + [True] * lost + [True, False, True])
        after = np.array([True] * won + [False] * lost + [True, False, True])
        p = reference.binomtest(won, won + lost).pvalue if won + lost else 1
        assert stats.mcnemar(before, after) == {"won": won, "lost": lost, "p": pytest.approx(p)}


def by_hand(table, right):
    """The definitions; `table` is in units of the seventh decimal."""
    images, texts = range(len(table)), range(len(table[0]))
    kinds = ("image", "text", "group") + ("match",) * stats.one_to_one(right)
    if not np.isfinite(table).all():
        return dict.fromkeys(kinds, False)
    table = [[round(x) for x in row] for row in table]
    wrong = [(i, t) for i in images for t in texts if (i, t) not in right]
    out = {
        "image": all(table[i][t] > table[j][u] for i, t in right for j, u in wrong if t == u),
        "text": all(table[i][t] > table[j][u] for i, t in right for j, u in wrong if i == j),
    }
    out["group"] = out["image"] and out["text"]
    if "match" in kinds:
        given = itertools.permutations(texts, len(images))
        sums = {texts: sum(table[i][t] for i, t in enumerate(texts)) for texts in given}
        own = sums.pop(tuple(t for _, t in sorted(right)))
        out["match"] = all(own > other for other in sums.values())
    return out


@pytest.mark.parametrize("images, texts", [(1, 6), (2, 2), (2, 3), (3, 3), (3, 5), (4, 4), (3, 2)])
def test_answers_against_every_comparison(images, texts):
    """Few values, so that ties happen; the noise is below the seventh decimal."""
    rng, seen = np.random.default_rng(images * 10 + texts), set()
    for case in range(120):
        right = tuple((i, int(rng.integers(texts))) for i in range(images))
        if case % 2 and texts >= images:
            right = tuple(enumerate(rng.permutation(texts)[:images].tolist()))
        tables = rng.integers(-3, 4, (3, images, texts)).astype(float)
        for i, t in right:
            tables[:, i, t] += case % 5
        if case % 6 == 0:
            tables[1, rng.integers(images), rng.integers(texts)] = rng.choice([np.nan, np.inf, -np.inf])
        tables += rng.uniform(-0.4, 0.4, tables.shape)
        found = stats.answers(tables * 1e-7, right)
        for n, table in enumerate(tables):
            assert {kind: bool(values[n]) for kind, values in found.items()} == by_hand(table.tolist(), right), case
        seen |= {(kind, bool(value)) for kind, values in found.items() for value in values}
    kinds = ("image", "text", "match") if texts >= images else ("text",)
    assert seen >= {(kind, value) for kind in kinds for value in (True, False)} - {("image", False)}


def test_what_is_right_at_the_edges():
    """A collapsed encoder has nothing right; a match may be where both texts prefer one image."""
    for value, size in itertools.product((0.3, np.nan, np.inf), (2, 4)):
        right = tuple((i, i) for i in range(size))
        assert not any(v.any() for v in stats.answers(np.full((5, size, size), value), right).values())
    found = stats.answers(np.array([[0.30, 0.28], [0.20, 0.27]]), ((0, 0), (1, 1)))
    assert {kind for kind, value in found.items() if value} == {"text", "match"}
    # Every cycle of a set of 200 gains: sums do not overflow.
    assert not stats.answers(-np.eye(200), tuple((i, i) for i in range(200)))["match"]


@dataclasses.dataclass
class Marks(ItemTask):
    """Items that each set of weights has right or not; `held` is {metric: bool [N]}."""

    settings: Settings = Settings(bootstrap=400)
    title, items = "Marks", "items"
    metrics = {"first": {"title": "first", "unit": "%"}, "matches": {"title": "m", "unit": "%", "answers": "match"}}

    def answer(self, model):
        return model, [], {"patterns": [{"name": "all", "count": 9, "scores": {"first": {"score": 7.0}}}]}

    def values(self, metric, held):
        return Values(held[metric].astype(float), strata=np.arange(len(held[metric])) % 3)


class Held(dict):
    label = "x"


def outcomes(count, share, seed=0, n=60):
    rng, task = np.random.default_rng(seed), Marks()
    held = [Held((metric, rng.random(n) < share) for metric in task.metrics) for _ in range(count)]
    return list(map(task.evaluate, held))


@pytest.mark.parametrize("counts", [(2, 2), (3, 7), (5, 2)])
def test_the_interval_over_runs_is_students_and_welchs(counts):
    rng = np.random.default_rng(counts)
    after, before = (rng.normal(scale=rng.uniform(0.1, 9), size=n) for n in counts)
    one = reference.ttest_1samp(after, 0).confidence_interval()
    two = reference.ttest_ind(after, before, equal_var=False).confidence_interval()
    np.testing.assert_allclose(seeds.student(after), one, atol=1e-9)
    np.testing.assert_allclose(seeds.student(after, before), two, atol=1e-9)
    np.testing.assert_allclose(seeds.student(after, [3.0]), [end - 3 for end in one], atol=1e-9)
    assert seeds.student(after[:1], before[:1]) is None and seeds.student([2.1] * 3) is None


@pytest.mark.parametrize("counts", [(1, 3), (3, 1), (2, 4)])
def test_a_group_is_the_mean_of_its_runs_over_items_and_over_runs(counts):
    task, (before, after) = Marks(), [outcomes(n, 0.4 + 0.2 * i, seed=i) for i, n in enumerate(counts)]
    found = seeds.compare(task, before, after)["scores"]["first"]
    means = [[100 * m.held["first"].mean() for m in side] for side in (before, after)]
    assert found["difference"] == pytest.approx(np.mean(means[1]) - np.mean(means[0]))
    singles = [task.compare(b, a)["scores"]["first"]["difference"] for a in after for b in before]
    assert np.mean(singles) == pytest.approx(found["difference"])
    assert found["runs_interval"] == pytest.approx(seeds.student(means[1], means[0]))
    assert found["interval"][0] < found["difference"] < found["interval"][1] and found["mcnemar"] is None
    Difference.model_validate(found)
    for side, mean in zip((before, after), means, strict=True):
        scored = seeds.outcome(task, side)["scores"]["first"]
        assert scored["score"] == pytest.approx(np.mean(mean))
        assert scored.get("runs", []) == (pytest.approx(mean) if len(side) > 1 else [])
    assert seeds.outcome(task, after)["patterns"][0]["scores"]["first"]["score"] == 7.0
    del after[-1].results["scores"]["matches"]  # As where the gradient of one of the runs is zero.
    assert [*seeds.outcome(task, after)["scores"]] == ["first"]
    task, (b,), (a,) = Marks(), outcomes(1, 0.4), outcomes(1, 0.6, 1)
    assert seeds.compare(task, [b], [a]) == task.compare(b, a) and seeds.outcome(task, [a]) is a.results


# How groups are written, and what they name; changes of a run's config, its step, and what is said of its group.
NAMED, DIFFERENT = json.loads(Path(__file__).with_name("groups.json").read_text()).values()


def test_how_a_group_is_written(tmp_path, monkeypatch):
    """What may be a group is a folder where there is one of this name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b,c").mkdir()
    assert {text: list(weight_sets.parse(text)) for text in NAMED} == NAMED
    refused("--weights=runs/a,runs/b does not exist: give the flag once for each", weight_sets.parse, "runs/a,runs/b")
    for text in ("t=runs/a", "t=runs/a,", "t=runs/a,runs/a", "t=runs/a,runs/b,runs/a"):
        refused("must name two runs or more, each once", weight_sets.parse, text)


def test_the_runs_of_a_group_differ_in_their_seed_alone(tmp_path):
    for case, (change, step, message) in enumerate(DIFFERENT):
        first = {"seed": 0, "lr": 1.0}
        trees.change(tmp_path, {f"{case}a/config.json": first, f"{case}b/config.json": first | change})
        where = [(str(tmp_path / f"{case}{name}"), at) for name, at in (("a", 9), ("b", step))]
        places = [Place(folder, at, folder) for folder, at in where]
        refused(message, weight_sets.check_group, "t", places) if message else weight_sets.check_group("t", places)


@pytest.mark.parametrize("clusters", [[0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 3]])
def test_the_best_by_chance_is_that_of_all_exchanges(clusters):
    changes = np.random.default_rng(3).normal(size=(3, 6)).round(2)
    found = seeds.largest_by_chance(changes, np.array(clusters), 6000, seed=0)
    every = []
    for signs in itertools.product((-1, 1), repeat=max(clusters) + 1):
        every.append((changes * np.array(signs)[clusters]).sum(axis=1).max())
    assert set(found.round(6)) == set(np.round(every, 6))
    for q in (0.1, 0.5, 0.9):
        assert abs(np.mean(found <= np.quantile(every, q)) - np.mean(every <= np.quantile(every, q))) < 0.03
    changes = np.random.default_rng(0).choice([-1.0, 0, 1], (8, 90))
    given = (changes[:1], changes, np.repeat(changes[:1], 8, axis=0))
    one, eight, copies = (np.quantile(seeds.largest_by_chance(c, np.arange(90), 4000, 0), 0.95) for c in given)
    assert copies == one < eight


@pytest.mark.parametrize("gain, claimed", [(0.0, False), (0.3, True)])
def test_the_sentence_on_the_best(gain, claimed):
    task, group, after = Marks(), outcomes(2, 0.4, n=240), outcomes(4, 0.4 + gain, seed=5, n=240)
    labels = [f"run:{i}" for i in range(4)]
    by_label = {"ref": [{"m": b} for b in group]} | {label: [{"m": a}] for label, a in zip(labels, after, strict=True)}
    before = np.mean([b.held["matches"].mean() for b in group])
    runs = {"runs/x": labels, "runs/y": ["ref"]}
    (text,) = seeds.best_notes({"m": task}, by_label, runs, True, Settings(bootstrap=2000))
    means = [100 * (a.held["matches"].mean() - before) for a in after]
    assert f"the best of 4 checkpoints in Marks, m is run:{np.argmax(means)} with {max(means):+.2f}" in text
    assert (float(text.rpartition("p = ")[2].rstrip(")")) < 0.01) == claimed
    (silent,) = seeds.best_notes({"m": task}, by_label, runs, False, Settings())
    assert "is given at 4 checkpoints" in silent and "--best" in silent
    assert seeds.best_notes({"m": task}, by_label, {"runs/y": ["ref"]}, True, Settings(bootstrap=2000)) == []
