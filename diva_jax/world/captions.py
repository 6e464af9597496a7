"""Captions of scenes: rich ones name nearly every fact, biased ones little but the objects, as captions on the web do.

What a caption says follows from its scene and from random choices that do not depend on the scene, so that the same
choices describe a scene with one fact changed in the same words but those of that fact.
"""

from typing import NamedTuple

import numpy as np

from diva_jax.world import scenes as facts
from diva_jax.world.scenes import Scenes

NUMBERS = ("one", "two", "three", "four")
PREFIX = "a photo of"  # Of half of the captions; MMVP-VLM's statements follow it.
# Fact of `scenes.FACTS` -> share of captions that name it. "binding" is named where the colours are.
RICH = dict(
    colour=1.0, orientation=0.95, feature=0.9, state=0.9, count=0.95, relation=0.95, texture=0.9, size=0.9, binding=1.0
)
BIASED = dict(
    colour=0.9, orientation=0.2, feature=0.2, state=0.15, count=0.25, relation=0.2, texture=0.2, size=0.2, binding=0.9
)
KINDS = {"rich": RICH, "biased": BIASED}
WORDS = tuple(
    dict.fromkeys(
        " ".join(
            (
                *(w for s in facts.SHAPES for w in (s, s + "s", s + "es")),
                *(*facts.COLOURS, *facts.SIZES, *facts.TEXTURES, *facts.HOLES, *facts.DIRECTIONS, *facts.RELATIONS),
                *(*facts.TIMES, *NUMBERS, PREFIX, "pointing and several"),
            )
        ).split()
    )
)


class Choices(NamedTuple):
    """The random choices of N captions.

    Attributes:
      says: fact -> whether it is named, bool [N, 2], per object.
      swap: [N], whether the second object of a pair is named first.
      prefix: [N], whether the caption begins with `PREFIX`.
    """

    says: dict[str, np.ndarray]
    swap: np.ndarray
    prefix: np.ndarray


def choose(rng: np.random.Generator, count: int, rates: dict[str, float]) -> Choices:
    """The choices of `count` captions that name each fact in this share of the cases, see `RICH`."""
    says = {fact: rng.random((count, 2)) < rates[fact] for fact in sorted(rates)}
    return Choices(says, rng.random(count) < 0.5, rng.random(count) < 0.5)


def only(rng: np.random.Generator, count: int, fact: str) -> Choices:
    """The choices of `count` captions without prefix that name the objects' colours, this fact, and no other."""
    rates = dict.fromkeys(RICH, 0.0) | {"colour": 1.0, fact: 1.0}
    return choose(rng, count, rates)._replace(prefix=np.zeros(count, bool))


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("ss") else "s")


def _object(s: Scenes, c: Choices, i: int, k: int, article: str, plural: bool = False) -> str:
    """Object k of scene i with the facts that the caption names of it."""

    def word(fact, names, field):
        return [names[field[i, k]]] if c.says[fact][i, k] else []

    noun = facts.SHAPES[s.shape[i, k]]
    words = [
        *([article] if article else []),
        *word("size", facts.SIZES, s.size),
        *word("texture", facts.TEXTURES, s.texture),
        *word("colour", facts.COLOURS, s.colour),
        _plural(noun) if plural else noun,
        *word("feature", facts.HOLES, s.hole),
    ]
    if s.shape[i, k] in facts.ORIENTED and c.says["orientation"][i, k]:
        words += ["pointing", facts.DIRECTIONS[s.direction[i, k]]]
    return " ".join(words)


def captions(scenes: Scenes, choices: Choices) -> list[str]:
    """One caption per scene."""
    s, out = scenes, []
    for i in range(len(s)):
        parts = [PREFIX] if choices.prefix[i] else []
        if s.group[i]:
            count, says = int(s.count[i]), choices.says["count"][i, 0]
            article = "a" if count == 1 else NUMBERS[count - 1] if says else "several"
            parts.append(_object(s, choices, i, 0, article, plural=count > 1))
        else:
            first, second = (1, 0) if choices.swap[i] else (0, 1)
            relation = facts.RELATIONS[s.relation[i] ^ (1 if choices.swap[i] else 0)]
            joined = relation if choices.says["relation"][i, 0] else "and"
            parts += [_object(s, choices, i, first, "a"), joined, _object(s, choices, i, second, "a")]
        if choices.says["state"][i, 0]:
            parts.append(facts.TIMES[s.time[i]])
        out.append(" ".join(parts))
    return out
