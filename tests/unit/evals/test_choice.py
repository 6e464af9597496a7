"""Choices: every published layout against scoring by hand, ties and scores that are not finite, bad rows."""

import itertools
import json

import choice_data as sets
import numpy as np
import pytest
from eval_data import patch

from diva_jax.common.errors import UserError
from diva_jax.common.fields import default_of
from diva_jax.evals import Settings, choice_sets
from diva_jax.evals.choice_layouts import Item
from diva_jax.evals.tasks import choice


def prepare(path, **options):
    section = default_of(choice)
    section.update({"allow_partial": True} | options)
    return choice.prepare(str(path), section, Settings(bootstrap=300))


class Fake:
    """Embeddings of few values, so that ties happen."""

    label = "fake"

    def __init__(self, seed=0):
        self.seed = seed

    def images(self, read, count):
        self.sizes = [read(i).size for i in range(count)]
        rng = np.random.default_rng(self.seed)
        self.pooled = rng.integers(-1, 2, (count, 4)) + np.array([0, 0, 0, 2])
        return {"pooled": self.pooled.astype(np.float32)}

    def texts(self, texts):
        rng = np.random.default_rng(self.seed + 1)
        self.words = rng.integers(-1, 2, (len(texts), 4)) + np.array([0, 0, 2, 0])
        self.row = {t: i for i, t in enumerate(texts)}
        return self.words.astype(np.float32)


def by_hand(task, model, name):
    """The cosine of each item's pictures and texts."""
    number = {p: i for i, p in enumerate(task.images)}

    def cosine(p, t):
        a, b = model.pooled[number[p]].astype(float), model.words[model.row[t]].astype(float)
        return round(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b), 7)

    return [[[cosine(p, t) for t in item.texts] for p in item.images] for item in task.sets[name]]


def scored(path, **options):
    task, model = prepare(path, **options), Fake()
    found = task.evaluate(model)
    for s in found.results["scores"].values():
        assert s["interval"][0] <= s["score"] <= s["interval"][1]
    after = task.evaluate(Fake(5))
    for key, s in task.compare(found, after)["scores"].items():
        change = after.results["scores"][key]["score"] - found.results["scores"][key]["score"]
        assert s["difference"] == pytest.approx(change)
    assert set(found.results["scores"]) == set(task.metrics)
    return task, model, {k: v["score"] / 100 for k, v in found.results["scores"].items()}, found


def first_wins(table):
    return all(table[0][0] > other for other in table[0][1:])


@pytest.mark.parametrize("write, name, count", [(sets.sugarcrepe, "add_att", 7), (sets.valse, "existence", 4)])
def test_one_picture_two_texts(tmp_path, write, name, count):
    task, model, scores, found = scored(write(tmp_path))
    right = [first_wins(t) for t in by_hand(task, model, name)]
    assert task.count == count == len(right)
    assert scores == {f"{name}_accuracy": pytest.approx(np.mean(right))}
    assert [r["correct"] for r in found.rows] == right


@pytest.mark.parametrize("write, name", [(sets.winoground, "winoground"), (sets.naturalbench, "naturalbench")])
def test_two_pictures_two_texts(tmp_path, write, name):
    task, model, scores, _ = scored(write(tmp_path))
    tables = by_hand(task, model, name)
    text = [s[0][0] > s[0][1] and s[1][1] > s[1][0] for s in tables]
    image = [s[0][0] > s[1][0] and s[1][1] > s[0][1] for s in tables]
    assert scores[f"{name}_text"] == pytest.approx(np.mean(text))
    assert scores[f"{name}_image"] == pytest.approx(np.mean(image))
    assert scores[f"{name}_group"] == pytest.approx(np.mean(np.logical_and(text, image)))


@pytest.mark.parametrize("kind, counts", [("relation", {"on": 5, "behind": 3}), ("attribution", {"a_b": 26, "c_d": 9})])
def test_accuracy_by_class_of_the_boxes(tmp_path, kind, counts):
    task, model, scores, _ = scored(sets.aro(tmp_path, kind, counts))
    name = "vg_" + kind
    right = [first_wins(t) for t in by_hand(task, model, name)]
    labels = list(itertools.chain.from_iterable([c] * n for c, n in counts.items()))
    kept = {c for c, n in counts.items() if kind == "relation" or n >= 25}
    classes = [np.mean([r for r, label in zip(right, labels, strict=True) if label == c]) for c in kept]
    assert scores == {
        f"{name}_accuracy": pytest.approx(np.mean(classes)),
        f"{name}_items": pytest.approx(np.mean(right)),
    }
    assert model.sizes == [(21, b.box[3] - 3) for b in task.images]
    first = task.images[0]
    np.testing.assert_allclose(task._read(0), np.asarray(patch(0))[3 : first.box[3], 2:23], atol=60)


def test_attributes_need_a_class_of_25(tmp_path):
    with pytest.raises(UserError, match="visual_genome_attribution.json: no class has 25 items"):
        prepare(sets.aro(tmp_path, "attribution", {"a_b": 3}))


@pytest.mark.parametrize("kind", ["images", "clevr"])
def test_controlled_pictures_single_pair_set(tmp_path, kind):
    task, model, scores, _ = scored(sets.whatsup(tmp_path, kind))
    name = f"controlled_{kind}"
    right = np.array([first_wins(t) for t in by_hand(task, model, name)]).reshape(-1, 4)
    assert scores[f"{name}_single"] == pytest.approx(right.mean())
    assert scores[f"{name}_pair"] == pytest.approx(right.reshape(-1, 2).all(axis=1).mean())
    assert scores[f"{name}_set"] == pytest.approx(right.all(axis=1).mean())


@pytest.mark.parametrize("kind", ["coco_qa_one_obj", "vg_qa_two_obj"])
def test_questions_on_coco_and_gqa(tmp_path, kind):
    task, model, scores, _ = scored(sets.whatsup_qa(tmp_path, kind))
    assert scores[f"{kind}_accuracy"] == pytest.approx(np.mean([first_wins(t) for t in by_hand(task, model, kind)]))


def test_folder_with_several_sets_and_pictures_elsewhere(tmp_path):
    sets.sugarcrepe(tmp_path / "a")
    sets.valse(tmp_path / "a")
    (tmp_path / "b").mkdir()
    for name in ("add_att.json", "existence.json"):
        (tmp_path / "a" / name).rename(tmp_path / "b" / name)
    task = prepare(tmp_path / "b", images=str(tmp_path / "a"))
    assert list(task.metrics) == ["add_att_accuracy", "existence_accuracy"] and task.count == 11
    with pytest.raises(UserError, match="its image .* does not exist"):
        prepare(tmp_path / "b")


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_own_set(tmp_path, form):
    for i in range(5):
        sets.picture(tmp_path / f"{i}.jpg", i)
    if form == "csv":
        lines = ["item,image,text,right", "x,0.jpg,a cat,1", "x,0.jpg,a dog,0", "x,1.jpg,a dog,1"]
        lines += ["y,2.jpg,red,1", "y,2.jpg,blue,0", "y,2.jpg,green,0"]
        text = "\n".join(lines)
    else:
        rows = [{"images": ["0.jpg", "1.jpg"], "texts": ["a cat", "a dog"]}]
        rows.append({"images": ["2.jpg"], "texts": ["blue", "red", "green"], "pairs": [[0, 1]]})
        text = "\n".join(map(json.dumps, rows))
    path = tmp_path / f"mine.{form}"
    path.write_text(text)
    task, model, scores, _ = scored(path)
    (two, one) = by_hand(task, model, "mine")
    truth = task.sets["mine"][1].texts.index("red")
    own = [one[0][truth] > s for t, s in enumerate(one[0]) if t != truth]
    text_right = [two[0][0] > two[0][1] and two[1][1] > two[1][0], all(own)]
    image_right = [two[0][0] > two[1][0] and two[1][1] > two[0][1], True]
    assert scores["mine_text"] == pytest.approx(np.mean(text_right))
    assert scores["mine_image"] == pytest.approx(np.mean(image_right))
    assert scores["mine_group"] == pytest.approx(np.mean(np.logical_and(text_right, image_right)))


@pytest.mark.parametrize("shape", [(1, 6), (2, 3), (3, 2)])
@pytest.mark.parametrize("seed", range(60))
def test_answers_against_every_comparison(seed, shape):
    rng = np.random.default_rng(seed)
    values = [-1.0, 0.0, 0.5, 0.5, 1.0] + ([np.nan, np.inf, -np.inf] if seed % 3 == 0 else [])
    table = rng.choice(values, shape)
    right = [(i, int(rng.integers(shape[1]))) for i in range(shape[0])]
    item = Item("x", ("p",) * shape[0], ("t",) * shape[1], tuple(right))
    got = {k: bool(v[0]) for k, v in choice.answers([table], [item]).items()}
    cells = list(itertools.product(range(shape[0]), range(shape[1])))
    finite = bool(np.isfinite(table).all())
    text = finite and all(
        table[i, t] > table[i, u] for i, t in right for j, u in cells if i == j and (i, u) not in right
    )
    asked = {t for _, t in right}
    finite = bool(np.isfinite(table[:, sorted(asked)]).all())
    image = finite and all(
        table[i, t] > table[j, t] for i, t in right for j, u in cells if u == t and (j, t) not in right
    )
    assert got == {"text": text, "image": image, "group": text and image}


def test_collapsed_encoder_scores_nothing():
    item = Item("x", ("p", "q"), ("s", "t"), ((0, 0), (1, 1)))
    for value in (0.3, np.nan, np.inf):
        assert not any(v[0] for v in choice.answers([np.full((2, 2), value)], [item]).values())


def test_published_counts_are_asserted(tmp_path):
    with pytest.raises(UserError, match="add_att.json has 7 items, the published set has 692.*allow_partial"):
        prepare(sets.sugarcrepe(tmp_path), allow_partial=False)
    (tmp_path / "mine.json").write_text((tmp_path / "add_att.json").read_text())
    assert prepare(tmp_path / "mine.json", allow_partial=False, layout="sugarcrepe").count == 7
    with pytest.raises(UserError, match="no published name"):
        prepare(tmp_path / "mine.json")
    assert sum(row.count for row in choice_sets.TABLE if row.layout == "sugarcrepe") == 7511


def broken(path, row, **change):
    value = json.loads(path.read_text())
    value[row] = {k: v for k, v in (value[row] | change).items() if v is not None}
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda r: broken(sets.sugarcrepe(r), "6", filename="none.jpg"), "add_att.json, row 6: its image .*none.jpg"),
        (
            lambda r: broken(sets.sugarcrepe(r), "6", caption=None),
            "add_att.json, row 6: the field 'caption' is missing",
        ),
        (lambda r: broken(sets.sugarcrepe(r), "6", negative_caption=3), "row 6: the field 'negative_caption'"),
        (lambda r: broken(sets.naturalbench(r), 2, image_1="no.jpg"), "metadata.json, row 2: its image .*no.jpg"),
        (lambda r: broken(sets.aro(r, "relation", {"on": 3}), 1, bbox_w=0), "row 1: the box has no area"),
        (lambda r: broken(sets.aro(r, "relation", {"on": 3}), 1, bbox_x="1"), "row 1: the field 'bbox_x'"),
        (lambda r: broken(sets.aro(r, "attribution", {"a_b": 3}), 1, attributes=["a"]), "row 1: .*two texts"),
        (lambda r: broken(sets.whatsup(r), 5, caption_options=["x"]), "row 5: there must be at least two texts"),
        (lambda r: broken(sets.whatsup(r), 5, image_path="a.jpg"), "row 5: 'a.jpg' is not named"),
        (lambda r: broken(sets.valse(r), "existence_3", mturk={}), "row existence_3, mturk: the field 'caption'"),
    ],
)
def test_bad_rows_are_refused(tmp_path, make, says):
    with pytest.raises(UserError, match=says):
        prepare(make(tmp_path))


def test_incomplete_sets_of_controlled_pictures_are_refused(tmp_path):
    path = sets.whatsup(tmp_path)
    rows = json.loads(path.read_text())
    for changed, says in ((rows[:-1], "row 8: cup2_chair has only left, on, right"), (rows + rows[:1], "'left' twice")):
        path.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=says):
            prepare(path)


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("a.csv", "item,image,text\n", "has no column right"),
        ("a.csv", "item,image,text,right\nx,0.jpg,cat,2\n", "line 2: .*right must be 0 or 1"),
        ("a.csv", "item,image,text,right\nx,0.jpg,cat,1\n", "line 2: everything belongs together"),
        ("a.csv", "item,image,text,right\nx,0.jpg,cat,0\n", "line 2: an image has no text"),
        ("a.csv", "item,image,text,right\nx,9.jpg,cat,1\nx,9.jpg,dog,0\n", "line 2: its image"),
        ("a.csv", "item,image,text,right\n", "has no items"),
        ("a.jsonl", "{", "a.jsonl, line 1 cannot be read as JSON"),
        ("a.jsonl", '{"images": ["0.jpg"], "texts": ["a", "b"], "pairs": [[0, 2]]}', "line 1: 'pairs' must be"),
        ("a.jsonl", '{"images": ["0.jpg"], "texts": ["a", ""]}', "line 1: 'images' and 'texts' must hold texts"),
        ("add_att.json", "3", "neither a list nor an object"),
        ("add_att.json", "[", "cannot be read as JSON"),
        ("vg_qa_one_obj.json", "[[1, 2]]", "row 0: a row is"),
        ("examples.jsonl", "[]", "line 1: the field 'image_0'"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, text, says):
    sets.picture(tmp_path / "0.jpg", 0)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        prepare(tmp_path / name)


def test_paths_without_a_set_are_refused(tmp_path):
    for path, says in ((tmp_path, "has no file of a published set"), (tmp_path / "x.json", "does not exist")):
        with pytest.raises(UserError, match=says):
            prepare(path)
