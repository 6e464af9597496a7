"""The pairs in MMVP-VLM's layout, and the labels of the probes."""

import json

import numpy as np
import pytest
from helpers import refused

from diva_jax.evals.tasks import mmvp
from diva_jax.world import blindness, endpoints, scenes


def test_pairs_are_read_by_the_task_mmvp(tmp_path):
    blindness.write_pairs(tmp_path, seed=4, count=3)
    names, count = mmvp.read_patterns(str(tmp_path))
    questions = mmvp.read_questions(str(tmp_path))
    assert names == scenes.FACTS and count == 3 and len(questions) == 2 * 3 * 4
    found = blindness.pairs(seed=4, count=3)
    assert [q.text for q in questions] == [f"a photo of {t}" for t in found.texts]
    assert (found.pattern == np.arange(12) // 3).all()
    assert all(a != b for a, b in zip(found.texts[::2], found.texts[1::2], strict=True))


@pytest.mark.parametrize("content", ["[", "[]", '{"patterns": [], "pairs": 2}', '{"patterns": ["a"], "pairs": 0}'])
def test_a_broken_list_of_patterns_is_named(tmp_path, content):
    blindness.write_pairs(tmp_path, seed=4, count=1)
    (tmp_path / mmvp.NAMES).write_text(content)
    refused("Patterns.json.*(repair or remove it|it must read .*; remove it)", mmvp.read_questions, str(tmp_path))
    (tmp_path / mmvp.NAMES).write_text(json.dumps({"patterns": ["a"], "pairs": 30}))
    refused("has 8 questions, MMVP-VLM has 60", mmvp.read_questions, str(tmp_path))


def test_labels_are_those_of_the_left_or_upper_object():
    s = scenes.sample(np.random.default_rng(3), 200)
    before = blindness.labels(s)
    swapped, bound = (blindness.labels(scenes.change(s, f, np.random.default_rng(0))) for f in ("relation", "binding"))
    assert all((other["near colour"] != before["near colour"]).all() for other in (swapped, bound))
    assert (bound["near shape"] == before["near shape"]).all() and (swapped["near shape"] != before["near shape"]).all()


def test_classes_are_the_two_objects_whatever_their_relation():
    s = scenes.sample(np.random.default_rng(3), 200)
    found = blindness.classes(s)
    assert len(blindness.CLASSES) == 72 and len(set(found)) > 60
    for i, k in enumerate(found):
        assert set(blindness.CLASSES[k]) == set(zip(s.colour[i].tolist(), s.shape[i].tolist(), strict=True))
    assert (blindness.classes(scenes.change(s, "relation", np.random.default_rng(0))) == found).all()
    assert (blindness.classes(scenes.change(s, "binding", np.random.default_rng(0))) != found).all()


def test_tests_share_no_scene_and_an_oracle_of_the_texts_sees_all(monkeypatch):
    monkeypatch.setattr(blindness, "_PROBE_TRAIN", 60)
    monkeypatch.setattr(blindness, "_PROBE_TEST", 40)
    t = blindness.Tests.make(seed=1, count=5)
    assert len({x.tobytes() for x in [*t.train_images, *t.test_images]}) == 100
    assert (t.pairs.images.shape, len(t.pairs.texts)) == ((20, 2, 16, 16, 3), 40)
    texts = np.eye(40 + 72)
    own = {image.tobytes(): texts[i] for i, image in enumerate(t.pairs.images.reshape(40, 16, 16, 3))}
    own |= {image.tobytes(): texts[40 + k] for image, k in zip(t.test_images, blindness.classes(t.test), strict=True)}
    found = blindness.measure(t, lambda x: np.stack([own.get(i.tobytes(), texts[0]) for i in x]), texts)
    for name, e in endpoints.ENDPOINTS.items():
        assert e.score(found) == 100 or name.startswith("probe"), name
