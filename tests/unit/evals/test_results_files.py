"""predictions.csv and results.json hold any text, and the form that is documented is the one that is declared."""

import csv
import json
import re
import typing

import numpy as np
import pydantic
import pytest
import report_samples as samples
from places import ROOT

from diva_jax.common import results_schema
from diva_jax.common.errors import RunError
from diva_jax.evals import results

PIECES = ["\r", "\n", "\r\n", '"', "'", ",", ";", "\t", "=", "+", "-", "@", "a", "é", "\x00", "\x1b[31m", " ", "\u2028"]


def read(folder) -> list[dict]:
    with open(folder / "predictions.csv", encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def content(tmp_path, names) -> dict:
    """A valid results.json with tasks of these names."""
    task = samples.drift_task()
    return samples.write_evaluation(tmp_path, [], **{"drift": task}) | {"tasks": dict.fromkeys(names, task)}


@pytest.mark.attack
@pytest.mark.parametrize("seed", range(5))
def test_csv_readers_get_back_what_was_written(tmp_path, seed):
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(PIECES, int(rng.integers(0, 7)))) for _ in range(100)]
    rows = [
        {"task": "t", "item": i, "text": text, "score": -0.25 * i, "correct": i % 2 == 0, "own": None}
        for i, text in enumerate(texts)
    ]
    results.write(tmp_path, content(tmp_path, texts), rows)
    found = read(tmp_path)
    assert len(found) == len(rows)
    for row, text in zip(found, texts, strict=True):
        assert row["text"] in (text, "'" + text) and not row["text"].startswith(results._FORMULA_PREFIXES)
        assert (row["text"] == text) == (not text.startswith(results._FORMULA_PREFIXES))
        assert float(row["score"]) == -0.25 * int(row["item"]) and row["correct"] in ("True", "False")
    assert json.loads((tmp_path / "results.json").read_text("utf-8"))["tasks"].keys() == set(texts)


@pytest.mark.attack
def test_names_of_files_that_are_no_text(tmp_path):
    """Python stands for a byte that is not UTF-8 by half of a surrogate pair, which UTF-8 does not have."""
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    results.write(tmp_path, content(tmp_path, [name]), [{"file": name}])
    assert read(tmp_path)[0]["file"] == "caf\\udce9.jpg"
    assert list(json.loads((tmp_path / "results.json").read_text("utf-8"))["tasks"]) == [name]


def test_what_the_report_could_not_show_is_an_error_after_the_files_are_written(tmp_path):
    wrong = content(tmp_path / "sample", ["mine"])
    wrong["tasks"]["mine"]["comparisons"][0]["scores"]["cosine"]["score"] = "0.9"
    with pytest.raises(RunError, match=r"tasks\.mine\.comparisons\.0\.scores\.cosine\.score\.score is '0\.9'"):
        results.write(tmp_path, wrong, [])
    assert json.loads((tmp_path / "results.json").read_text()) == wrong


def fields_of(form, seen: set) -> set[str]:
    """The names of the fields of a form and of those that it is made of."""
    if isinstance(form, type) and issubclass(form, pydantic.BaseModel) and form not in seen:
        seen.add(form)
        parts = [fields_of(field.annotation, seen) for field in form.model_fields.values()]
        return set(form.model_fields).union(*parts)
    return set().union(*(fields_of(part, seen) for part in typing.get_args(form)))


def test_the_documented_form_is_the_declared_one():
    page = (ROOT / "docs" / "EVALUATION.md").read_text()
    example = json.loads(re.search(r"```json\n(.*?)```", page, re.S)[1])
    assert results_schema.Results.model_validate(example).labels == ["openai", "vitl14:4600"]
    words = set(re.findall(r"\w+", page))
    assert fields_of(results_schema.Results, set()) <= words
