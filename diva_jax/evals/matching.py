"""Right answers where images and texts meet, and what a change of them means; docs/EVALUATION.md has the definitions.

Winoground (arXiv 2204.03162) defines the choices of texts and images and the group, "Test-Time Matching" (arXiv
2510.07632) the match. Matches say what is told apart, choices also whether the cosines are calibrated: both texts may
be a little closer to the same image.
"""

from collections.abc import Sequence

import numpy as np

# Key -> the name for readers, of what "image" to "match" count.
ANSWERS = {"image": "pairs", "text": "texts", "group": "groups", "match": "matches"}
# Decimals to which cosines are rounded, so that the rounding of embeddings and sums does not turn a tie into an answer.
_DECIMALS = 7
# Bounds the sums over cycles; only their sign counts.
_LARGE = 1e18


def rounded(scores: np.ndarray) -> np.ndarray:
    """Cosines in units of the seventh decimal, float64: sums and comparisons of them are exact."""
    return np.rint(np.asarray(scores, np.float64) * 10**_DECIMALS)


def _chosen(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Whether in each row the right columns are higher than all others: [..., R, C], bool [R, C] -> bool [...]."""
    lowest = np.where(right, scores, np.inf).min(axis=-1)
    return (lowest > np.where(right, -np.inf, scores).max(axis=-1)).all(axis=-1)


def _matched(scores: np.ndarray) -> np.ndarray:
    """Whether giving text i to image i has a higher sum than any other one-to-one assignment: [..., K, T] -> [...].
    Every other one differs from it by cycles (image i takes the text of image j, which takes another one, ...) or by
    paths that end at a text beyond the first K; all of them must lose, as Floyd and Warshall's algorithm finds."""
    count = scores.shape[-2]
    gain = scores - np.diagonal(scores, axis1=-2, axis2=-1)[..., None]
    if scores.shape[-1] > count:  # One more image without a text of its own stands for the texts beyond.
        gain = np.concatenate([gain[..., :count], gain[..., count:].max(axis=-1, keepdims=True)], axis=-1)
        gain = np.concatenate([gain, np.zeros_like(gain[..., :1, :])], axis=-2)
    nodes = np.arange(gain.shape[-1])
    gain[..., nodes, nodes] = -np.inf
    for via in nodes:
        longer = gain[..., :, via, None] + gain[..., None, via, :]
        gain = np.minimum(np.maximum(gain, longer), _LARGE)
    return (gain[..., nodes, nodes] < 0).all(axis=-1)


def answers(scores: np.ndarray, right: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
    """Which items are right, bool [...], under scores [..., images, texts], cosines, those that agree to seven decimals
    being equal; a tie is wrong, and so is an item with a score that is not finite.

    `right` are the (image, text) numbers that belong together in all items; every image has a text. "text": for each
    image, its texts score higher than all others. "image": for each text that has an image, its images do. "group":
    both. "match", where every image has one text of its own: their sum is above that of any other one-to-one
    assignment.
    """
    scores = rounded(scores)
    finite = np.isfinite(scores).all(axis=(-2, -1))
    scores = np.where(finite[..., None, None], scores, 0.0)
    mask = np.zeros(scores.shape[-2:], bool)
    mask[tuple(zip(*right, strict=True))] = True
    asked = mask.any(axis=0)  # A text without an image is a wrong alternative.
    out = {
        "image": finite & _chosen(scores[..., asked].swapaxes(-1, -2), mask[:, asked].T),
        "text": finite & _chosen(scores, mask),
    }
    out["group"] = out["image"] & out["text"]
    if one_to_one(right):
        order = [text for _, text in sorted(right)]
        out["match"] = finite & _matched(scores[..., order + [t for t in range(mask.shape[1]) if t not in order]])
    return out


def one_to_one(right: Sequence[tuple[int, int]]) -> bool:
    """Whether every image has one text, which no other has."""
    return all(len(set(numbers)) == len(right) for numbers in zip(*right, strict=True))


def metrics(key: str, **of: str) -> dict[str, dict[str, str]]:
    """The entries of a task's `metrics`: `KEY` counts pairs, `KEY_text`, `KEY_group` and `KEY_match` the rest; `of` has
    the `readout` or `dataset` that the four numbers belong to."""
    (name,) = of.values()
    return {
        key if kind == "image" else f"{key}_{kind}": {"title": f"{what}, {name}", "unit": "%", "answers": kind, **of}
        for kind, what in ANSWERS.items()
    }
