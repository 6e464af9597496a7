"""predictions.csv and results.json hold any text, and what reads them gets it back."""

import csv
import json

import numpy as np
import pytest

from diva_jax.evals import results

pytestmark = pytest.mark.attack

PIECES = ["\r", "\n", "\r\n", '"', "'", ",", ";", "\t", "=", "+", "-", "@", "a", "é", "\x00", "\x1b[31m", " ", "\u2028"]


def read(folder) -> list[dict]:
    with open(folder / "predictions.csv", encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize("seed", range(5))
def test_csv_readers_get_back_what_was_written(tmp_path, seed):
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(PIECES, int(rng.integers(0, 7)))) for _ in range(100)]
    rows = [
        {"task": "t", "item": i, "text": text, "score": -0.25 * i, "correct": i % 2 == 0, "own": None}
        for i, text in enumerate(texts)
    ]
    results.write(tmp_path, {"tasks": {text: i for i, text in enumerate(texts)}}, rows)
    found = read(tmp_path)
    assert len(found) == len(rows)
    for row, text in zip(found, texts, strict=True):
        assert row["text"] in (text, "'" + text) and not row["text"].startswith(results._FORMULAS)
        assert (row["text"] == text) == (not text.startswith(results._FORMULAS))
        assert float(row["score"]) == -0.25 * int(row["item"]) and row["correct"] in ("True", "False")
    assert json.loads((tmp_path / "results.json").read_text("utf-8"))["tasks"].keys() == set(texts)


def test_names_of_files_that_are_no_text(tmp_path):
    """Python stands for a byte that is not UTF-8 by half of a surrogate pair, which UTF-8 does not have."""
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    results.write(tmp_path, {"file": name}, [{"file": name}])
    assert read(tmp_path)[0]["file"] == "caf\\udce9.jpg"
    assert json.loads((tmp_path / "results.json").read_text("utf-8")) == {"file": name}
