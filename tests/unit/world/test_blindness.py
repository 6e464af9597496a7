"""The pairs in MMVP-VLM's layout, and the labels of the probes."""

import json

import numpy as np
import pytest

from diva_jax.common.errors import UserError
from diva_jax.evals.tasks import mmvp
from diva_jax.world import blindness, scenes


def test_pairs_are_read_by_the_task_mmvp(tmp_path):
    blindness.write_pairs(tmp_path, seed=4, count=3)
    names, count = mmvp.read_patterns(str(tmp_path))
    questions = mmvp.read_questions(str(tmp_path))
    assert names == scenes.FACTS and count == 3 and len(questions) == 2 * 3 * 9
    found = blindness.pairs(seed=4, count=3)
    assert [q.text for q in questions] == [f"a photo of {t}" for t in found.texts]
    assert (found.pattern == np.arange(27) // 3).all()
    assert all(a != b for a, b in zip(found.texts[::2], found.texts[1::2], strict=True))


@pytest.mark.parametrize("content", ["[", "[]", '{"patterns": [], "pairs": 2}', '{"patterns": ["a"], "pairs": 0}'])
def test_a_broken_list_of_patterns_is_named(tmp_path, content):
    blindness.write_pairs(tmp_path, seed=4, count=1)
    (tmp_path / mmvp.NAMES).write_text(content)
    with pytest.raises(UserError, match="Patterns.json.*(repair or remove it|it must read .*; remove it)"):
        mmvp.read_questions(str(tmp_path))
    (tmp_path / mmvp.NAMES).write_text(json.dumps({"patterns": ["a"], "pairs": 30}))
    with pytest.raises(UserError, match="has 18 questions, MMVP-VLM has 60"):
        mmvp.read_questions(str(tmp_path))


def test_labels_of_pairs_are_those_of_the_left_or_upper_object():
    s = scenes.sample(np.random.default_rng(3), 400)
    mask, colour = blindness.labels(s)["left colour"]
    assert (mask == (s.group == 0)).all()
    moved = s.take(mask)
    swapped = scenes.change(moved, "relation", np.random.default_rng(0))
    bound = scenes.change(moved, "binding", np.random.default_rng(0))
    for other in (swapped, bound):
        assert (blindness.labels(other)["left colour"][1] != colour[mask]).all()
    assert (blindness.labels(bound)["left shape"][1] == blindness.labels(moved)["left shape"][1]).all()


def test_tests_share_no_scene_with_each_other():
    t = blindness.Tests.make(seed=1, count=2, train=50, test=40)
    assert len({x.tobytes() for x in [*t.train_images, *t.test_images]}) == 90
    assert (t.pairs.images.shape, len(t.pairs.texts)) == ((18, 2, 32, 32, 3), 36)
