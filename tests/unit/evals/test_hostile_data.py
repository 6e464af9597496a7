"""Questions, captions and lists of evaluation data, changed by field and by byte: refused in one sentence, or used."""

import csv
import io
import json

import eval_data
import numpy as np
import pytest
from eval_data import write_image, write_mmvp
from mutations import WRONG, changed, damaged, outcome

from diva_jax.data import labelled
from diva_jax.evals.tasks import choice, mmvp

pytestmark = pytest.mark.attack


def cells(rng, rows: list[list[str]]) -> bytes:
    """A CSV file of which cells were replaced, and rows repeated, swapped or cut."""
    rows = [list(row) for row in rows]
    for _ in range(int(rng.integers(1, 4))):
        row, what = rows[rng.integers(len(rows))], int(rng.integers(6))
        if what <= 2:
            row[rng.integers(len(row))] = str(WRONG[rng.integers(len(WRONG))])
        elif what == 3:
            rows.insert(int(rng.integers(len(rows))), list(row))
        elif what == 4 and len(row) > 1:
            row.pop()
        else:
            rows.reverse()
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    root = write_mmvp(tmp_path_factory.mktemp("mmvp"))
    with open(root / "Questions.csv", newline="") as f:
        return root, (root / "Questions.csv").read_bytes(), list(csv.reader(f))


@pytest.mark.parametrize("seed", range(4))
def test_questions(questions, seed):
    root, data, rows = questions
    rng = np.random.default_rng(seed)
    outside = root.parent.resolve()
    for case in range(40):
        (root / "Questions.csv").write_bytes(damaged(rng, data) if case % 2 else cells(rng, rows))
        found = outcome(lambda: mmvp.read_questions(str(root)))
        for question in found or ():
            assert question.image.resolve().is_relative_to(outside / root.name) and question.text
    (root / "Questions.csv").write_bytes(data)
    assert len(mmvp.read_questions(str(root))) == 270


SETS = ["sugarcrepe", "winoground"]


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("seed", range(3))
def test_choices(tmp_path, name, seed):
    file = getattr(eval_data, name)(tmp_path)
    ((_, row),) = choice.published(file, "")
    data, rng = file.read_bytes(), np.random.default_rng(seed)
    lines = data.decode().splitlines() if file.suffix == ".jsonl" else None
    for case in range(30):
        if case % 2:
            file.write_bytes(damaged(rng, data))
        elif lines:
            i = int(rng.integers(len(lines)))
            new = [*lines[:i], json.dumps(changed(rng, json.loads(lines[i]), 2)[0]), *lines[i + 1 :]]
            file.write_text("\n".join(new))
        else:
            file.write_text(json.dumps(changed(rng, json.loads(data), 2)[0]))
        found = outcome(lambda: choice.read_set(file, row, "", True))
        for item in found or ():
            assert all(isinstance(text, str) and text for text in item.texts)
            assert all(image.path.is_file() for image in item.images)


@pytest.mark.parametrize("seed", range(3))
def test_captions_and_names(tmp_path, seed):
    rng = np.random.default_rng(seed)
    write_image(tmp_path / "a.jpg", 1)
    rows = [["image", "caption"], *([f"{'./' * i}a.jpg", f"caption {i}"] for i in range(5))]
    for case in range(30):
        data = cells(rng, rows)
        (tmp_path / "c.csv").write_bytes(damaged(rng, data) if case % 2 else data)
        outcome(lambda: labelled.caption_csv(tmp_path / "c.csv"))
        names = json.dumps(changed(rng, {"a": ["b", "c"], "d": ["e"]}, 2)[0]).encode()
        (tmp_path / "names.json").write_bytes(damaged(rng, names) if case % 2 else names)
        outcome(lambda: labelled.read_names(str(tmp_path / "names.json")))
        (tmp_path / "nshards.txt").write_text(str(WRONG[rng.integers(len(WRONG))]))
        outcome(lambda: labelled.tars(tmp_path, "cls", int))
