"""MMVP-VLM: checks of the files, and the scores against the written definitions."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from eval_data import FakeModel, prepared, unit, write_mmvp
from helpers import refused

from diva_jax.evals.stats import ANSWERS as KINDS
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
    """Scores pair by pair. Returns kind -> which of the 135 are right, and the number of ties."""
    right, ties = {kind: [] for kind in KINDS}, 0
    for n in range(0, ROWS, 2):
        c = [[round(float(images[n + i] @ unit(texts[n + t].astype(float))), 7) for t in (0, 1)] for i in (0, 1)]
        ties += (c[0][0] == c[1][0]) + (c[0][1] == c[1][1])
        right["image"].append(c[0][0] > c[1][0] and c[1][1] > c[0][1])
        right["text"].append(c[0][0] > c[0][1] and c[1][1] > c[1][0])
        right["group"].append(right["image"][-1] and right["text"][-1])
        right["match"].append(round(c[0][0] + c[1][1] - c[0][1] - c[1][0], 7) > 0)
    return {kind: np.array(values) for kind, values in right.items()}, ties


def key(readout: str, kind: str) -> str:
    return readout if kind == "image" else f"{readout}_{kind}"


def test_scores_equal_brute_force_ties_included(original):
    task, total_ties = prepare(original), 0
    for seed in range(5):
        model = Fake(seed)
        found = task.evaluate(model).results
        pooled, _ = brute_force(unit(model.pooled.astype(np.float64)), model.text)
        by_seed = [brute_force(model.published[:, k].astype(np.float64), model.text) for k in range(3)]
        total_ties += sum(ties for _, ties in by_seed)
        for kind in KINDS:
            right, draws = pooled[kind], [r[kind] for r, _ in by_seed]
            one, many = (found["scores"][key(readout, kind)] for readout in ("pooled", "published"))
            assert one["score"] == pytest.approx(100 * right.mean(), abs=1e-9)
            assert many["score"] == pytest.approx(100 * np.mean(draws), abs=1e-9)
            np.testing.assert_allclose(many["seeds"], [100 * r.mean() for r in draws])
            for i, pattern in enumerate(found["patterns"]):
                assert pattern["name"] == PATTERNS[i]
                want = 100 * right[15 * i : 15 * i + 15].mean()
                assert pattern["scores"][key("pooled", kind)]["score"] == pytest.approx(want, abs=1e-9)
            for s in (one, many):
                low, high = s["interval"]
                assert low < s["score"] < high and 4 < high - low < 25
    assert total_ties > 20


def test_every_score_is_in_the_rows(original):
    found = prepare(original).evaluate(Fake(0))
    assert len(found.rows) == ROWS * (1 + 3)
    for row in found.rows:
        assert row["correct"] == (row["truth"] == row["predicted"]) and row["truth"] == (1 if row["item"] % 2 else 2)
        assert row["predicted"] == (0 if abs(row["score"] - 0.5) < 1e-9 else 1 if row["score"] > 0.5 else 2)
        assert row["score"] == pytest.approx(1 / (1 + np.exp(row["logit_image_2"] - row["logit_image_1"])))
    pooled = [r for r in found.rows if r["metric"] == "pooled"]
    assert all(a["image_right"] == b["image_right"] == (a["correct"] and b["correct"])
               for a, b in zip(pooled[::2], pooled[1::2], strict=True))  # fmt: skip
    for kind in KINDS:
        score = found.results["scores"][key("pooled", kind)]["score"]
        assert 100 * np.mean([r[f"{kind}_right"] for r in pooled]) == pytest.approx(score)
    assert pooled[31]["file"] == "Presence/32.jpg" and pooled[31]["pair"] == 15 and pooled[31]["pattern"] == PATTERNS[1]


def test_flipped_pairs_have_their_images_and_texts(original):
    task = prepare(original)
    before, after = task.evaluate(Fake(1)), task.evaluate(Fake(2))
    found = task.compare(before, after)
    assert {f["metric"] for f in found["flipped"]} == {"pooled", "pooled_match", "published", "published_match"}
    b, a = (outcome.held["pooled"]["image"][0] for outcome in (before, after))
    flips = [f for f in found["flipped"] if f["metric"] == "pooled"]
    assert [f["item"] for f in flips] == list(np.flatnonzero(a != b))
    test = found["scores"]["pooled"]["mcnemar"]
    assert (test["won"], test["lost"]) == ((a & ~b).sum(), (b & ~a).sum())
    for f in flips:
        assert f["won"] == a[f["item"]] and f["group"] == PATTERNS[f["item"] // 15]
        assert [p.rsplit("/", 1)[1] for p in f["images"]] == [f"{2 * f['item'] + 1}.jpg", f"{2 * f['item'] + 2}.jpg"]
        assert all(os.path.isabs(p) and os.path.exists(p) for p in f["images"])
        assert (f["after"][0] > 0.5 + 1e-9 and f["after"][1] < 0.5 - 1e-9) == f["won"]
    same = task.compare(before, before)
    assert same["flipped"] == [] and same["scores"]["pooled"]["mcnemar"]["p"] == 1


def test_names_of_the_folder_and_tables_from_windows(root):
    for before, folder in zip(FOLDERS, FOLDERS[1:], strict=False):
        for path in (root, root / before, root / "Questions.csv"):
            assert len(mmvp.read_questions(str(path))) == ROWS
        os.rename(root / before, root / folder)
    assert len(mmvp.read_questions(str(root / FOLDERS[-1]))) == ROWS
    table = root / "Questions.csv"
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes().replace(b"\n", b"\r\n"))
    assert mmvp.read_questions(str(root))[0].text == "a photo of thing number 0, seen from above"


BAD_TABLES = json.loads(Path(__file__).with_name("mmvp.json").read_text())


def test_bad_tables_are_refused(root):
    lines = (root / "Questions.csv").read_text().splitlines()
    for first, last, new, says in BAD_TABLES.values():
        changed = [*lines[:first], *(lines[n] if isinstance(n, int) else n for n in new), *lines[last:]]
        (root / "Questions.csv").write_text("\n".join(changed) + "\n")
        refused(says, mmvp.read_questions, str(root))


def test_missing_folders_and_bad_images_are_named(tmp_path, root):
    refused("Questions.csv does not exist: give --data=mmvp=FOLDER", prepare, tmp_path)
    (tmp_path / "Questions.csv").write_text("")
    refused("has none of the folders 'MLLM_VLM Images'", prepare, tmp_path)
    image = root / FOLDERS[0] / "Texts" / "213.jpg"
    data = image.read_bytes()
    image.unlink()
    refused(r"line 214: its image .*213.jpg does not exist", prepare, root)
    for broken in (b"", b"no image", data[: len(data) // 2]):
        image.write_bytes(broken)
        refused(r"the image .*213.jpg cannot be read", prepare, root)
