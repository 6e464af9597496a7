"""Choices and MMVP-VLM: every published layout against scoring by hand, ties, scores that are not finite, bad rows."""

import itertools
import json
import os
import shutil
from functools import partial

import numpy as np
import pytest
import trees
from eval_data import FakeModel, evaluated, patch, prepared, unit, write_choices, write_image, write_mmvp
from helpers import refused

from diva_jax.evals import stats
from diva_jax.evals.tasks import choice, mmvp

prepare = partial(prepared, "choice", allow_partial=True)


class Coarse(FakeModel):
    def draw(self, *shape):
        return self.rng.integers(-1, 2, (*shape, 4)) + np.array([0, 0, 1, 2])


def tables(task, model, name):
    return [cosines(task, model, item.images, item.texts) for item in task.sets[name]]


def cosines(task, model, images, words):
    number = {image: i for i, image in enumerate(task.images)}
    a = unit(np.stack([model.pooled[0][number[image]] for image in images]).astype(float))
    return np.round(a @ unit(np.stack([model.words[t] for t in words]).astype(float)).T, 7)


def first_wins(items):
    return np.array([all(table[0][0] > other for other in table[0][1:]) for table in items])


def accuracy(items):
    return {"accuracy": first_wins(items).mean()}


def paired(items):
    """The right answers, by the definitions that test_statistics checks."""
    right = stats.answers(np.stack(items), [(i, i) for i in range(len(items[0]))])
    return {kind: values.mean() for kind, values in right.items()}


def by_class(counts, least, items):
    right = first_wins(items)
    parts = np.split(right, np.cumsum(list(counts.values()))[:-1])
    kept = [p.mean() for name, p in zip(counts, parts, strict=True) if len(p) >= least and name != "next to"]
    return {"accuracy": np.mean(kept), "items": right.mean()}


def controlled(items):
    right = first_wins(items).reshape(-1, 2)
    return {"single": right.mean(), "pair": right.all(1).mean(), "set": right.reshape(-1, 4).all(1).mean()}


RELATIONS, ATTRIBUTES = {"on": 5, "behind": 2, "next to": 1}, {"a_b": 26, "c_d": 9}
# Set of choices.json -> (its scores by hand, the number of its items that are used).
LAYOUTS = {"add_att": (accuracy, 7), "existence": (accuracy, 4), "winoground": (paired, 5), "naturalbench": (paired, 6)}
LAYOUTS["vg_relation"] = partial(by_class, RELATIONS, 1), 8
LAYOUTS["vg_attribution"] = partial(by_class, ATTRIBUTES, 25), 35
LAYOUTS |= dict.fromkeys(("controlled_images", "controlled_clevr"), (controlled, 12))
LAYOUTS |= dict.fromkeys(("coco_qa_one_obj", "vg_qa_two_obj"), (accuracy, 5))


@pytest.mark.parametrize("name", LAYOUTS)
def test_scores_by_hand(tmp_path, name):
    by_hand, count = LAYOUTS[name]
    task = prepare(write_choices(tmp_path, name))
    model, found, compared = evaluated(task, Coarse)
    items = tables(task, model, name)
    assert task.count == count == len(items)
    scores = by_hand(items)
    if by_hand is controlled:
        groups = [task.sets[name][i : i + size] for size in (2, 4) for i in range(0, count, size)]
        joint = [cosines(task, model, [i.images[0] for i in g], [i.texts[0] for i in g]) for g in groups]
        scores |= {f"pair_{metric}": value for metric, value in paired(joint[: count // 2]).items()}
        scores["set_match"] = paired(joint[count // 2 :])["match"]
    want = {f"{name}_{metric}": pytest.approx(100 * value) for metric, value in scores.items()}
    assert {k: v["score"] for k, v in found.results["scores"].items()} == want
    strata = by_hand not in (accuracy, paired, controlled)
    for metric, change in compared["scores"].items():
        assert (change["mcnemar"] is None) == (strata and metric.endswith("accuracy"))
    names = [p["name"] for p in found.results["patterns"]]
    kinds = {"winoground": "Object Relation", "controlled_images": "heights sides", "controlled_clevr": "depths sides"}
    parts = kinds.get(name, "").split()
    assert names == [f"{name}{'_pair' * (by_hand is controlled)}, {part}" for part in parts]
    if parts:
        pairs = f"{name}_{'pair_' * (by_hand is controlled)}match"
        counts = [p["count"] * p["scores"][pairs]["score"] for p in found.results["patterns"]]
        assert sum(counts) / sum(p["count"] for p in found.results["patterns"]) == want[pairs]
    if by_hand is accuracy:
        assert [r["correct"] for r in found.rows] == list(first_wins(items))
    if name.startswith("vg_rel"):
        assert model.sizes[0] == [(21, image.box[3] - 3) for image in task.images]
        np.testing.assert_allclose(task._read(0), np.asarray(patch(0))[3 : task.images[0].box[3], 2:23], atol=60)


def test_several_sets_with_images_elsewhere(tmp_path):
    (tmp_path / "b").mkdir()
    for file in (write_choices(tmp_path / "a", name) for name in ("add_att", "existence")):
        file.rename(tmp_path / "b" / file.name)
    task = prepare(tmp_path / "b", images=str(tmp_path / "a"))
    assert list(task.metrics) == ["add_att_accuracy", "existence_accuracy"] and task.count == 11
    refused("its image .* does not exist", prepare, tmp_path / "b")


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_own_set(tmp_path, form):
    for i in range(3):
        write_image(tmp_path / f"{i}.jpg", i)
    lines = ["item,image,text,right", "x,0.jpg,a cat,1", "x,0.jpg,a dog,0", "x,1.jpg,a dog,1"]
    lines += ["y,2.jpg,red,1", "y,2.jpg,blue,0", "y,2.jpg,green,0"]
    if form == "jsonl":
        rows = [{"images": ["0.jpg", "1.jpg"], "texts": ["a cat", "a dog"]}]
        rows.append({"images": ["2.jpg"], "texts": ["blue", "red", "green"], "pairs": [[0, 1]]})
        lines = map(json.dumps, rows)
    path = tmp_path / f"mine.{form}"
    path.write_text("\n".join(lines))
    task = prepare(path)
    model, found, _ = evaluated(task, Coarse)
    two, one = tables(task, model, "mine")
    truth = task.sets["mine"][1].texts.index("red")
    own = all(one[0][truth] > s for t, s in enumerate(one[0]) if t != truth)
    want = {k: (bool(v) + (1 if k == "image" else own)) / 2 for k, v in paired([two]).items()}
    assert found.results["scores"].keys() == {f"mine_{k}" for k in want}
    for kind, value in want.items():
        assert found.results["scores"][f"mine_{kind}"]["score"] == pytest.approx(100 * value)


def test_published_counts_are_asserted(tmp_path):
    write_choices(tmp_path, "add_att").rename(tmp_path / "mine.json")
    assert prepare(tmp_path / "mine.json", allow_partial=False, layout="sugarcrepe").count == 7
    assert sum(row.count for row in choice.TABLE.values() if row.layout == "sugarcrepe") == 7511


ROWS = 270

prepare_mmvp = partial(prepared, "mmvp", bootstrap=2000, seeds=3)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_mmvp(tmp_path_factory.mktemp("mmvp"))


def right_pairs(images, texts):
    """Which of the 135 pairs each kind of answer has right, by the definitions that test_statistics checks."""
    pairs = (x.astype(np.float64).reshape(135, 2, -1) for x in (images, unit(texts)))
    return stats.answers(np.round(np.einsum("nid,ntd->nit", *pairs), 7), mmvp.OWN)


def key(readout: str, kind: str) -> str:
    return readout if kind == "image" else f"{readout}_{kind}"


def test_scores_patterns_and_rows_are_those_of_the_pairs(original):
    task, ties = prepare_mmvp(original), 0
    for seed in range(4):
        model = Coarse(seed)
        found, texts = task.evaluate(model), np.stack([model.words[text] for text in task.texts])
        draws = {"pooled": [unit(model.pooled[0])], "published": model.published[0].swapaxes(0, 1)}
        for readout, kind in itertools.product(draws, stats.ANSWERS):
            right = np.array([right_pairs(images, texts)[kind] for images in draws[readout]])
            score = found.results["scores"][key(readout, kind)]
            assert score["score"] == pytest.approx(100 * right.mean(), abs=1e-9)
            assert score.get("seeds", [score["score"]]) == pytest.approx(list(100 * right.mean(axis=1)))
            low, high = score["interval"]
            assert low < score["score"] < high < low + 25
            patterns = {p["name"]: p["scores"][key(readout, kind)]["score"] for p in found.results["patterns"]}
            each = [100 * right[:, i : i + 15].mean() for i in range(0, 135, 15)]
            assert patterns == pytest.approx(dict(zip(mmvp.PATTERNS, each, strict=True)))
            rows = [row for row in found.rows if row["metric"] == readout]
            assert [row[f"{kind}_right"] for row in rows] == right.repeat(2, axis=1).ravel().tolist()
    for row in found.rows:
        ties += row["predicted"] == 0
        assert row["correct"] == (row["truth"] == row["predicted"]) and row["truth"] == (1 if row["item"] % 2 else 2)
        assert row["predicted"] == (0 if abs(row["score"] - 0.5) < 1e-9 else 1 if row["score"] > 0.5 else 2)
        assert row["score"] == pytest.approx(1 / (1 + np.exp(row["logit_image_2"] - row["logit_image_1"])))
    assert rows[0]["logit_image_1"] == pytest.approx(100 * draws["published"][0][0] @ unit(texts)[0], abs=1e-4)
    assert ties > 20 and rows[31]["file"] == "Presence/32.jpg" and rows[31]["pair"] == 15


def test_flipped_pairs_have_their_images_and_texts(original):
    task = prepare_mmvp(original)
    before, after = task.evaluate(Coarse(1)), task.evaluate(Coarse(2))
    found = task.compare(before, after)
    assert {f["metric"] for f in found["flipped"]} == {"pooled", "pooled_match", "published", "published_match"}
    b, a = (outcome.held["pooled"]["image"][0] for outcome in (before, after))
    flips = [f for f in found["flipped"] if f["metric"] == "pooled"]
    assert [f["item"] for f in flips] == list(np.flatnonzero(a != b))
    test = found["scores"]["pooled"]["mcnemar"]
    assert (test["won"], test["lost"]) == ((a & ~b).sum(), (b & ~a).sum())
    for f in flips:
        assert f["won"] == a[f["item"]] and f["group"] == mmvp.PATTERNS[f["item"] // 15]
        assert [p.rsplit("/", 1)[1] for p in f["images"]] == [f"{2 * f['item'] + i}.jpg" for i in (1, 2)]
        assert all(os.path.isabs(p) and os.path.exists(p) for p in f["images"])
        assert (f["after"][0] > 0.5 + 1e-9 and f["after"][1] < 0.5 - 1e-9) == f["won"]
    same = task.compare(before, before)
    assert same["flipped"] == [] and same["scores"]["pooled"]["mcnemar"]["p"] == 1


def test_names_of_the_folder_and_tables_from_windows(original, tmp_path):
    root = shutil.copytree(original, tmp_path / "mmvp", copy_function=os.link)
    for before, folder in zip(mmvp.FOLDERS, mmvp.FOLDERS[1:], strict=False):
        for path in (root, root / before, root / "Questions.csv"):
            assert len(mmvp.read_questions(str(path))) == ROWS
        os.rename(root / before, root / folder)
    assert len(mmvp.read_questions(str(root / mmvp.FOLDERS[-1]))) == ROWS
    table = (root / "Questions.csv").read_text().replace("\n", "\r\n")
    trees.change(root, {"Questions.csv": f"\ufeff{table}"})
    assert mmvp.read_questions(str(root))[0].text == "a photo of thing number 0, seen from above"
