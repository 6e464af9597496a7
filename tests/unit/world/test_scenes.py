"""Scenes, images and captions of the world: each follows from its seed, and one fact can be changed alone."""

import dataclasses

import numpy as np
import pytest

from diva_jax.world import captions, drawing, scenes, vocabulary

FIELDS = {"relation": "relation", "colour": "colour", "binding": "colour", "shape": "shape"}


def drawn(seed: int = 3, count: int = 150) -> scenes.Scenes:
    return scenes.sample(np.random.default_rng(seed), count)


def test_scenes_follow_from_their_seed_and_have_two_different_objects():
    a, b, other = (drawn(s, 300) for s in (5, 5, 6))
    for field in dataclasses.fields(scenes.Scenes):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))
    assert (a.nuisance != other.nuisance).any()
    assert (a.shape[:, 0] != a.shape[:, 1]).all() and (a.colour[:, 0] != a.colour[:, 1]).all()
    assert set(a.shape.ravel()) == set(range(len(scenes.SHAPES))) and set(a.relation) == set(range(4))


@pytest.mark.parametrize("fact", scenes.FACTS)
def test_change_changes_one_fact_of_scene_image_and_caption(fact):
    one, rng = drawn(), np.random.default_rng(1)
    two = scenes.change(one, fact, rng)
    for field in dataclasses.fields(scenes.Scenes):
        same = getattr(one, field.name) == getattr(two, field.name)
        if field.name == FIELDS[fact]:
            assert not same.reshape(len(one), -1).all(axis=1).any()
        else:
            assert same.all(), field.name
    assert (two.shape[:, 0] != two.shape[:, 1]).all() and (two.colour[:, 0] != two.colour[:, 1]).all()
    # The image shows it: no pair of images is equal.
    assert np.abs(drawing.draw(one).astype(int) - drawing.draw(two)).reshape(len(one), -1).max(axis=1).min() > 20
    says = captions.choose(rng, len(one), 1.0)
    for a, b in zip(captions.captions(one, says), captions.captions(two, says), strict=True):
        differ = [(x, y) for x, y in zip(a.split(), b.split(), strict=False) if x != y]
        assert a != b and (len(a.split()) != len(b.split()) or len(differ) <= 2), (a, b)


def test_an_image_depends_on_its_own_scene_alone():
    s = drawn(2, 70)
    together = drawing.draw(s)
    assert together.shape == (70, 16, 16, 3) and together.dtype == np.uint8
    for i in (0, 37, 69):
        np.testing.assert_array_equal(drawing.draw(s.take([i]))[0], together[i])
    assert drawing.draw(s.take([])).shape == (0, 16, 16, 3)


def test_the_first_object_is_where_the_relation_says():
    """Of images whose two objects are red and green, with no background in these colours."""
    s = dataclasses.replace(drawn(7, 200), colour=np.tile(np.int8([0, 1]), (200, 1)))
    images = drawing.draw(s).astype(int)
    for image, relation in zip(images, s.relation, strict=True):
        red, green = (
            np.argwhere(image[..., k] > image.max(-1, where=np.arange(3) != k, initial=0) + 35) for k in (0, 1)
        )
        axis = 1 if relation < 2 else 0
        assert (red[:, axis].mean() < green[:, axis].mean()) == (relation % 2 == 0)


def test_captions_name_the_relation_as_often_as_their_rates_say():
    s, rng = drawn(4, 2000), np.random.default_rng(9)
    for kind, rate in captions.KINDS.items():
        texts = captions.captions(s, captions.choose(rng, len(s), rate))
        related = [any(r in t for r in scenes.RELATIONS) for t in texts]
        assert abs(np.mean(related) - rate) < 0.05, kind
        assert all(scenes.SHAPES[a] in t and scenes.SHAPES[b] in t for t, (a, b) in zip(texts, s.shape, strict=True))


def test_relations_are_told_from_either_side():
    s = drawn()
    one = captions.only(np.random.default_rng(0), len(s), "relation")
    texts = [captions.captions(s, one._replace(swap=np.full(len(s), x))) for x in (False, True)]
    opposite = dict(zip(scenes.RELATIONS, (*scenes.RELATIONS[1::-1], *scenes.RELATIONS[:1:-1]), strict=True))
    for a, b in zip(*texts, strict=True):
        told = next(r for r in scenes.RELATIONS if r in a)
        first, second = a.split(f" {told} ")
        assert b == f"{second} {opposite[told]} {first}"


def test_every_word_is_one_token_and_every_caption_fits(tmp_path):
    from diva_jax.data import tokenizers
    from diva_jax.world.models import TOKENS

    vocabulary.write(tmp_path, captions.WORDS, TOKENS)
    tokenizer = tokenizers.ClipTokenizer(*tokenizers.clip_vocabulary(tmp_path), TOKENS)
    start, end = (vocabulary.tokens(captions.WORDS)[f"<|{t}oftext|>"] for t in ("start", "end"))
    words = tokenizer(captions.WORDS)
    assert (words[:, 0] == start).all() and (words[:, 2] == end).all()  # One token between the two.
    assert len(set(words[:, 1])) == len(captions.WORDS)
    s, rng = drawn(7, 800), np.random.default_rng(8)
    texts = captions.captions(s, captions.choose(rng, len(s), 1.0))
    assert {word for t in texts for word in t.split()} <= set(captions.WORDS)
    longest = max(texts, key=lambda t: len(t.split()))
    assert len(longest.split()) <= TOKENS - 2 and end in tokenizer([longest])[0]
    assert tokenizer.size == len(vocabulary.tokens(captions.WORDS))
    np.testing.assert_array_equal(vocabulary.remembering(tokenizer)([longest, "a"]), tokenizer([longest, "a"]))
