"""What is right where images and texts meet, against every comparison and every assignment."""

import itertools

import numpy as np
import pytest

from diva_jax.evals import matching


def by_hand(table, right):
    """The definitions; `table` is in units of the seventh decimal."""
    images, texts = range(len(table)), range(len(table[0]))
    kinds = ("image", "text", "group") + ("match",) * matching.one_to_one(right)
    if not np.isfinite(table).all():
        return dict.fromkeys(kinds, False)
    table = [[round(x) for x in row] for row in table]
    wrong = [(i, t) for i in images for t in texts if (i, t) not in right]
    out = {
        "image": all(table[i][t] > table[j][u] for i, t in right for j, u in wrong if t == u),
        "text": all(table[i][t] > table[j][u] for i, t in right for j, u in wrong if i == j),
    }
    out["group"] = out["image"] and out["text"]
    if "match" in kinds:
        given = itertools.permutations(texts, len(images))
        sums = {texts: sum(table[i][t] for i, t in enumerate(texts)) for texts in given}
        own = sums.pop(tuple(t for _, t in sorted(right)))
        out["match"] = all(own > other for other in sums.values())
    return out


@pytest.mark.parametrize("images, texts", [(1, 6), (2, 2), (2, 3), (3, 3), (3, 5), (4, 4), (3, 2)])
def test_answers_against_every_comparison(images, texts):
    """Few values, so that ties happen; the noise is below the seventh decimal."""
    rng, seen = np.random.default_rng(images * 10 + texts), set()
    for case in range(120):
        right = tuple((i, int(rng.integers(texts))) for i in range(images))
        if case % 2 and texts >= images:
            right = tuple(enumerate(rng.permutation(texts)[:images].tolist()))
        tables = rng.integers(-3, 4, (3, images, texts)).astype(float)
        for i, t in right:
            tables[:, i, t] += case % 5
        if case % 6 == 0:
            tables[1, rng.integers(images), rng.integers(texts)] = rng.choice([np.nan, np.inf, -np.inf])
        tables += rng.uniform(-0.4, 0.4, tables.shape)
        found = matching.answers(tables * 1e-7, right)
        for n, table in enumerate(tables):
            assert {kind: bool(values[n]) for kind, values in found.items()} == by_hand(table.tolist(), right), case
        seen |= {(kind, bool(value)) for kind, values in found.items() for value in values}
    kinds = ("image", "text", "match") if texts >= images else ("text",)
    assert seen >= {(kind, value) for kind in kinds for value in (True, False)} - {("image", False)}


@pytest.mark.parametrize("value", [0.3, np.nan, np.inf])
def test_a_collapsed_encoder_has_nothing_right(value):
    for size in (2, 4):
        right = tuple((i, i) for i in range(size))
        assert not any(v.any() for v in matching.answers(np.full((5, size, size), value), right).values())


def test_a_match_where_both_texts_prefer_one_image():
    found = matching.answers(np.array([[0.30, 0.28], [0.20, 0.27]]), ((0, 0), (1, 1)))
    assert {kind for kind, value in found.items() if value} == {"text", "match"}
    # Every cycle of a set of 200 gains: sums do not overflow.
    assert not matching.answers(-np.eye(200), tuple((i, i) for i in range(200)))["match"]
