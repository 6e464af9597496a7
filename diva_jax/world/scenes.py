"""The facts of a scene, drawn at random: two objects that differ in shape and colour, side by side or one above the
other."""

import dataclasses

import numpy as np

SHAPES = ("square", "cross", "ring", "diamond")
COLOURS = ("red", "green", "blue", "yellow")
RELATIONS = ("left of", "right of", "above", "below")  # Where the first object is; 0 and 1, 2 and 3 are opposites.

# What the two images of a pair of the tests differ in.
FACTS = ("relation", "binding", "colour", "shape")
ABSENT = ("relation",)  # Facts that the kept CLIP cannot tell and the kept generator can, see `criteria`.


@dataclasses.dataclass(frozen=True)
class Scenes:
    """N scenes.

    Attributes:
      shape, colour: of each object, int8 [N, 2], indices into `SHAPES` and `COLOURS`.
      relation: int8 [N], index into `RELATIONS`.
      nuisance: [N, 10], float32 in [0, 1): places, shades, the background. No caption names them.
    """

    shape: np.ndarray
    colour: np.ndarray
    relation: np.ndarray
    nuisance: np.ndarray

    def __len__(self) -> int:
        return len(self.relation)


def sample(rng: np.random.Generator, count: int) -> Scenes:
    """`count` scenes."""

    def two(n):  # Two different values below n.
        first = rng.integers(0, n, count)
        return np.stack([first, (first + rng.integers(1, n, count)) % n], axis=1).astype(np.int8)

    relation = rng.integers(0, len(RELATIONS), count, np.int8)
    return Scenes(two(len(SHAPES)), two(len(COLOURS)), relation, rng.random((count, 10), np.float32))


def change(scenes: Scenes, fact: str, rng: np.random.Generator) -> Scenes:
    """The same scenes with one fact changed, everything else and the nuisances as they were.

    "relation" moves the objects to each other's place, "binding" exchanges their colours, "colour" and "shape" give the
    first object one that neither has.
    """
    s = scenes
    if fact == "relation":
        return dataclasses.replace(s, relation=s.relation ^ 1)
    if fact == "binding":
        return dataclasses.replace(s, colour=s.colour[:, ::-1])
    if fact not in FACTS:
        raise ValueError(f"{fact} is none of {FACTS}")
    old = getattr(s, fact)
    free = np.ones((len(s), len(SHAPES)), bool)
    free[np.arange(len(s))[:, None], old] = False
    new = (rng.random(free.shape) * free).argmax(axis=1).astype(np.int8)
    return dataclasses.replace(s, **{fact: np.stack([new, old[:, 1]], axis=1)})


def turned(scenes: Scenes, which: np.ndarray) -> Scenes:
    """The scenes with the relation along the other axis where `which`, bool [N], is true."""
    return dataclasses.replace(scenes, relation=scenes.relation ^ np.where(which, 2, 0).astype(np.int8))


def near(scenes: Scenes, values: np.ndarray) -> np.ndarray:
    """The value [N] of the left or upper object, of values [N, 2]."""
    return values[np.arange(len(scenes)), scenes.relation % 2]
