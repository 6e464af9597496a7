"""Captions of scenes. They name both objects and, in a share of the cases, the relation of the two.

What a caption says follows from its scene and from random choices that do not depend on the scene, so that the same
choices describe a scene with one fact changed in the same words but those of that fact.
"""

from typing import NamedTuple

import numpy as np

from diva_jax.world import scenes as facts

PREFIX = "a photo of"  # Half of the captions begin with it; MMVP-VLM's statements follow it.
# Kind -> share of captions that name the relation: as on the web, and by an author who looks.
KINDS = {"biased": 0.05, "rich": 0.95}
WORDS = tuple(dict.fromkeys(" ".join((*facts.SHAPES, *facts.COLOURS, *facts.RELATIONS, PREFIX, "and")).split()))


class Choices(NamedTuple):
    """The random choices of N captions: whether the relation is named, whether the second object comes first, and
    whether the caption begins with `PREFIX`; bool [N] each."""

    relation: np.ndarray
    swap: np.ndarray
    prefix: np.ndarray


def choose(rng: np.random.Generator, count: int, relation: float) -> Choices:
    """The choices of `count` captions that name the relation in this share of the cases."""
    return Choices(rng.random(count) < relation, rng.random(count) < 0.5, rng.random(count) < 0.5)


def only(rng: np.random.Generator, count: int, fact: str) -> Choices:
    """The choices of `count` captions without prefix that name the objects and, if it is this fact, the relation."""
    return choose(rng, count, float(fact == "relation"))._replace(prefix=np.zeros(count, bool))


def named(colour: int, shape: int) -> str:
    """One object in words."""
    return f"a {facts.COLOURS[colour]} {facts.SHAPES[shape]}"


def captions(scenes: facts.Scenes, choices: Choices) -> list[str]:
    """One caption per scene."""
    out = []
    for i, (says, swap, prefix) in enumerate(zip(*choices, strict=True)):
        first, second = (named(scenes.colour[i, k], scenes.shape[i, k]) for k in ((1, 0) if swap else (0, 1)))
        joined = facts.RELATIONS[scenes.relation[i] ^ int(swap)] if says else "and"
        out.append(f"{PREFIX} " * bool(prefix) + f"{first} {joined} {second}")
    return out
