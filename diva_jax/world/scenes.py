"""The facts of a scene, drawn at random: what is in the image, how many, of which colour, where, and so on.

A scene is of one of two kinds. In a *pair*, two objects that differ in shape and colour stand side by side or one
above the other. In a *group*, one to four objects are equal.
"""

import dataclasses

import numpy as np

SHAPES = ("circle", "square", "diamond", "cross", "triangle", "dome", "arrow")
ORIENTED = (4, 5, 6)  # Shapes that point somewhere.
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped")
HOLES = ("without a hole", "with a hole")
DIRECTIONS = ("up", "down", "left", "right")
RELATIONS = ("left of", "right of", "above", "below")  # Of the first object to the second; neighbours are opposite.
TIMES = ("by day", "at night")
MAX_OBJECTS = 4  # A group has at most this many.
_GROUPS = 0.4  # Share of scenes that are groups.

# What a pair of images of the blindness test differs in.
FACTS = ("orientation", "feature", "state", "count", "relation", "colour", "texture", "binding", "size")


@dataclasses.dataclass(frozen=True)
class Scenes:
    """N scenes. Arrays of facts are int8; those of shape [N, 2] are per object, and groups have the first alone.

    Attributes:
      group: [N], 1 for groups.
      count: [N], objects; 2 in pairs.
      shape, colour, size, texture, hole, direction: [N, 2], indices into the lists of this module. Objects that
        are not oriented have direction 0.
      relation: [N], index into `RELATIONS`; 0 in groups.
      time: [N], index into `TIMES`.
      nuisance: [N, 20], float32 in [0, 1): positions within their cells, shades, phases of stripes. No caption names
        them.
    """

    group: np.ndarray
    count: np.ndarray
    shape: np.ndarray
    colour: np.ndarray
    size: np.ndarray
    texture: np.ndarray
    hole: np.ndarray
    direction: np.ndarray
    relation: np.ndarray
    time: np.ndarray
    nuisance: np.ndarray

    def __len__(self) -> int:
        return self.group.shape[0]

    def take(self, rows) -> "Scenes":
        """The scenes of these rows."""
        return Scenes(*(getattr(self, f.name)[rows] for f in dataclasses.fields(self)))


def sample(rng: np.random.Generator, count: int) -> Scenes:
    """`count` scenes."""

    def below(n, *shape):
        return rng.integers(0, n, (count, *shape), np.int8)

    def two(n):  # Two different values below n.
        first = below(n)
        return np.stack([first, (first + 1 + below(n - 1)) % n], axis=1).astype(np.int8)

    group = (rng.random(count) < _GROUPS).astype(np.int8)
    shape, colour = two(len(SHAPES)), two(len(COLOURS))
    direction = np.where(np.isin(shape, ORIENTED), below(len(DIRECTIONS), 2), 0).astype(np.int8)
    return Scenes(
        group=group,
        count=np.where(group, 1 + below(MAX_OBJECTS), 2).astype(np.int8),
        shape=shape,
        colour=colour,
        size=below(2, 2),
        texture=below(2, 2),
        hole=below(2, 2),
        direction=direction,
        relation=np.where(group, 0, below(len(RELATIONS))).astype(np.int8),
        time=below(2),
        nuisance=rng.random((count, 20), np.float32),
    )


def has(scenes: Scenes, fact: str) -> np.ndarray:
    """[N], whether `change` can change this fact of a scene; the single facts of objects are those of groups."""
    group = scenes.group == 1
    oriented = np.isin(scenes.shape[:, 0], ORIENTED)
    special = {"orientation": group & oriented, "count": group & (scenes.count > 1), "state": group | ~group}
    if fact in ("relation", "binding"):
        return ~group
    return special.get(fact, group)


def change(scenes: Scenes, fact: str, rng: np.random.Generator) -> Scenes:
    """The same scenes with one fact changed, everything else and the nuisances as they were.

    The scenes must all have the fact, see `has`. Changes of two objects: "relation" moves the objects to each other's
    place, "binding" exchanges their colours. All others concern the first object or the whole scene.
    """

    def other(values, n, low=0):  # Another value of low .. low + n - 1.
        step = rng.integers(1, n, len(scenes))
        return (low + (values - low + step) % n).astype(np.int8)

    def first(field, values):
        return np.stack([values, field[:, 1]], axis=1).astype(np.int8)

    s = scenes
    if fact == "orientation":
        return dataclasses.replace(s, direction=first(s.direction, other(s.direction[:, 0], len(DIRECTIONS))))
    if fact == "feature":
        return dataclasses.replace(s, hole=first(s.hole, 1 - s.hole[:, 0]))
    if fact == "state":
        return dataclasses.replace(s, time=1 - s.time)
    if fact == "count":
        return dataclasses.replace(s, count=other(s.count, MAX_OBJECTS - 1, 2))
    if fact == "relation":
        return dataclasses.replace(s, relation=s.relation ^ 1)
    if fact == "colour":
        return dataclasses.replace(s, colour=first(s.colour, other(s.colour[:, 0], len(COLOURS))))
    if fact == "texture":
        return dataclasses.replace(s, texture=first(s.texture, 1 - s.texture[:, 0]))
    if fact == "binding":
        return dataclasses.replace(s, colour=s.colour[:, ::-1])
    if fact == "size":
        return dataclasses.replace(s, size=first(s.size, 1 - s.size[:, 0]))
    raise ValueError(f"{fact} is none of {FACTS}")
