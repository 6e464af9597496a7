"""MMVP-VLM: checks of the files, and the score against the written definition."""

import os
import shutil
from functools import partial

import numpy as np
import pytest
from eval_data import FakeModel, eval_config, prepared, unit, write_mmvp
from specs import EVAL_CLIP as CLIP

from diva_jax.common.errors import UserError
from diva_jax.evals.tasks import mmvp
from diva_jax.evals.tasks.mmvp import FOLDERS, PATTERNS

ROWS = 270


prepare = partial(prepared, "mmvp", bootstrap=2000, seeds=3)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_mmvp(tmp_path_factory.mktemp("mmvp"))


@pytest.fixture
def root(original, tmp_path):
    """A copy to modify; the images are links."""
    copy = tmp_path / "mmvp"
    shutil.copytree(original, copy, copy_function=os.link)
    table = (copy / "Questions.csv").read_text()
    (copy / "Questions.csv").unlink()
    (copy / "Questions.csv").write_text(table)
    return copy


class Fake(FakeModel):
    """Embeddings of few values, so that exact ties between the images of a pair occur."""

    def __init__(self, seed: int = 0, dim: int = 6):
        rng = np.random.default_rng(seed)
        self.pooled = rng.integers(-1, 2, (ROWS, dim)).astype(np.float32) + [2, *[0] * (dim - 1)]
        self.published = rng.integers(-1, 2, (ROWS, 3, dim)).astype(np.float32)
        self.text = rng.integers(-1, 2, (ROWS, dim)).astype(np.float32) + [*[0] * (dim - 1), 2]

    def images(self, read, count, seeds):
        assert count == ROWS and seeds == 3
        return {"pooled": self.pooled, "published": self.published}

    def texts(self, texts):
        assert texts[0] == "a photo of thing number 0, seen from above" and len(texts) == ROWS
        return self.text


def brute_force(images, texts):
    """Scores pair by pair, as the benchmark describes. Returns correct [135] and the number of ties."""
    right, ties = [], 0
    for n in range(ROWS // 2):
        answers = []
        for t in (2 * n, 2 * n + 1):
            word = texts[t] / np.sqrt(np.sum(np.square(texts[t], dtype=np.float64)))
            logits = [100 * float(np.dot(images[i].astype(np.float64), word)) for i in (2 * n, 2 * n + 1)]
            top = max(logits)
            e = [np.exp(x - top) for x in logits]
            first = np.float32(e[0] / (e[0] + e[1]))
            ties += first == 0.5
            answers.append(1 if first > 0.5 else 2)
        # Question ids count from 1: the first of a pair is odd, and asks for image 1.
        right.append(answers == [1, 2])
    return np.array(right), ties


def test_scores_equal_brute_force_ties_included(original):
    task, total_ties = prepare(original), 0
    for seed in range(5):
        model = Fake(seed)
        found = task.evaluate(model)
        right, _ = brute_force(unit(model.pooled.astype(np.float64)), model.text)
        by_seed = []
        for k in range(3):
            r, ties = brute_force(model.published[:, k], model.text)
            by_seed.append(r)
            total_ties += ties
        pooled, published = found.results["scores"]["pooled"], found.results["scores"]["published"]
        assert pooled["score"] == pytest.approx(100 * right.mean(), abs=1e-9)
        assert published["score"] == pytest.approx(100 * np.mean(by_seed), abs=1e-9)
        np.testing.assert_allclose(published["seeds"], [100 * r.mean() for r in by_seed])
        for i, pattern in enumerate(found.results["patterns"]):
            assert pattern["name"] == PATTERNS[i]
            want = 100 * right[15 * i : 15 * i + 15].mean()
            assert pattern["scores"]["pooled"]["score"] == pytest.approx(want, abs=1e-9)
        for s in (pooled, published):
            low, high = s["interval"]
            assert low < s["score"] < high and 4 < high - low < 25
    assert total_ties > 20


def test_a_tie_is_an_answer_for_image_2():
    images, texts = np.ones((4, 3)), np.random.default_rng(0).standard_normal((4, 3))
    _, first = mmvp.pair_scores(images, texts)
    assert (first == 0.5).all() and not mmvp.pairs_right(first).any()
    # Far apart: no overflow, no warning.
    _, first = mmvp.pair_scores(np.array([[1e3], [-1e3], [-1e3], [1e3]]), np.ones((4, 1)))
    np.testing.assert_array_equal(first, [1, 1, 0, 0])


def test_bind_names_the_published_readout(original):
    task = prepare(original)
    task.bind(eval_config(CLIP, original), None)
    assert task.metrics["published"]["title"] == f"published readout, {CLIP.readout}"
    titles = str(task.metrics)
    assert set(task.evaluate(Fake(0)).results["scores"]) == set(task.metrics) and str(task.metrics) == titles


def test_every_score_is_in_the_rows(original):
    task, model = prepare(original), Fake(0)
    found = task.evaluate(model)
    assert len(found.rows) == ROWS * (1 + 3)
    for row in found.rows:
        assert row["correct"] == (row["truth"] == row["predicted"]) and row["truth"] == (1 if row["item"] % 2 else 2)
        assert row["score"] == pytest.approx(1 / (1 + np.exp(row["logit_image_2"] - row["logit_image_1"])))
    pooled = [r for r in found.rows if r["metric"] == "pooled"]
    pairs = [a["correct"] and b["correct"] for a, b in zip(pooled[::2], pooled[1::2], strict=True)]
    assert 100 * np.mean(pairs) == pytest.approx(found.results["scores"]["pooled"]["score"])
    assert pooled[31]["file"] == "Presence/32.jpg" and pooled[31]["pair"] == 15 and pooled[31]["pattern"] == PATTERNS[1]


def test_comparison_of_two_weights(original):
    task = prepare(original)
    before, after = task.evaluate(Fake(1)), task.evaluate(Fake(2))
    found = task.compare(before, after)
    b, a = before.held["pooled"]["right"][0], after.held["pooled"]["right"][0]
    s = found["scores"]["pooled"]
    assert s["difference"] == pytest.approx(100 * (a.mean() - b.mean()))
    assert s["mcnemar"]["won"] == (a & ~b).sum() and s["mcnemar"]["lost"] == (b & ~a).sum()
    assert s["interval"][0] < s["difference"] < s["interval"][1]
    flips = [f for f in found["flipped"] if f["metric"] == "pooled"]
    assert [f["item"] for f in flips] == list(np.flatnonzero(a != b))
    for f in flips:
        assert f["won"] == a[f["item"]] and f["group"] == PATTERNS[f["item"] // 15]
        assert [p.rsplit("/", 1)[1] for p in f["images"]] == [f"{2 * f['item'] + 1}.jpg", f"{2 * f['item'] + 2}.jpg"]
        assert all(os.path.isabs(p) and os.path.exists(p) for p in f["images"])
        now = (f["after"][0] > 0.5) and not f["after"][1] > 0.5
        assert now == f["won"]
    same = task.compare(before, before)
    assert same["flipped"] == [] and same["scores"]["pooled"]["mcnemar"]["p"] == 1


def test_the_three_names_of_the_folder(root):
    for before, folder in zip(FOLDERS, FOLDERS[1:], strict=False):
        for path in (root, root / before, root / "Questions.csv"):
            assert len(mmvp.read_questions(str(path))) == ROWS
        os.rename(root / before, root / folder)
    assert len(mmvp.read_questions(str(root / FOLDERS[-1]))) == ROWS


def test_a_table_from_windows_is_read(root):
    table = root / "Questions.csv"
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes().replace(b"\n", b"\r\n"))
    assert mmvp.read_questions(str(root))[0].text == "a photo of thing number 0, seen from above"


# Case -> (from which line, up to which, the lines in their place: indices of lines or texts; what the error says).
BAD_TABLES = {
    "swapped in a pair": (3, 5, [4, 3], r"lines 4 and 5: a pair is an odd Question ID .* not 4 \(Orientation\) and 3"),
    "swapped between pairs": (2, 4, [3, 2], "lines 2 and 3: a pair is"),
    "swapped first ones": (1, 4, [3, 2, 1], "lines 2 and 3: a pair is"),
    "a row lost": (9, 10, [], "has 269 questions, MMVP-VLM has 270"),
    "a row twice": (9, 10, [9, 9], "has 271 questions"),
    "a pair twice": (3, 5, [1, 2], "line 4: question 1 appears twice"),
    "wrong id, no image": (5, 6, ["999,Orientation,x"], r"line 6: its image .*Orientation.999.jpg does not exist"),
    "wrong id, an image": (6, 7, ["8,Orientation,x"], "lines 6 and 7: a pair is"),
    "id no number": (6, 7, ["six,Orientation,x"], "line 7: the Question ID 'six' is not a number"),
    "wrong type": (6, 7, ["6,Presence,x"], "line 7: its image .* does not exist"),
    "empty statement": (6, 7, ["6,Orientation,"], "line 7: a row has Question ID, Type, Statement, none empty"),
    "a column more": (6, 7, ["6,Orientation,x,y"], "line 7: a row has"),
    "no header": (0, 1, [], "begins with .*, not Question ID,Type,Statement"),
    "empty": (0, 271, [], "begins with nothing"),
}


def test_bad_tables_are_refused(root):
    lines = (root / "Questions.csv").read_text().splitlines()
    for case, (first, last, new, says) in BAD_TABLES.items():
        changed = [*lines[:first], *(lines[n] if isinstance(n, int) else n for n in new), *lines[last:]]
        (root / "Questions.csv").write_text("\n".join(changed) + "\n")
        with pytest.raises(UserError, match=says):
            pytest.fail(f"{case}: {len(mmvp.read_questions(str(root)))} questions were read")


def test_bad_images_are_refused(root):
    image = root / FOLDERS[0] / "Texts" / "213.jpg"
    data = image.read_bytes()
    image.unlink()
    with pytest.raises(UserError, match=r"line 214: its image .*213.jpg does not exist"):
        prepare(root)
    for broken in (b"", b"no image", data[: len(data) // 2]):
        image.write_bytes(broken)
        with pytest.raises(UserError, match=r"the image .*213.jpg cannot be read"):
            prepare(root)


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="Questions.csv does not exist: give --data=mmvp=FOLDER"):
        prepare(tmp_path)
    (tmp_path / "Questions.csv").write_text("")
    with pytest.raises(UserError, match="has none of the folders 'MLLM_VLM Images'"):
        prepare(tmp_path)


def test_probabilities_that_are_not_finite_are_wrong():
    assert mmvp.pairs_right(np.array([0.9, 0.1, 0.9, np.nan, np.nan, 0.1])).tolist() == [True, False, False]
