"""Measures what an encoder of the small world sees: pairs that differ in one fact, names of objects, probes.

    python -m diva_jax.world.blindness --out=data/world_pairs     # the pairs in MMVP-VLM's layout
    python -m diva_jax.evaluate --config=configs/world.py --task=mmvp --data=data/world_pairs ...

All scenes are of seeds that no training data has. A pair is right where both of its texts choose the right one of its
two images, as in MMVP-VLM; both texts name the objects, their colours, and the fact in which the images differ.
"""

import csv
import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from absl import flags
from PIL import Image

from diva_jax import world
from diva_jax.data import preprocess, tokenizers
from diva_jax.evals import encode, stats
from diva_jax.evals.tasks import mmvp
from diva_jax.evals.tasks.probe import fit
from diva_jax.training import partition
from diva_jax.weights import formats, names, parts
from diva_jax.world import captions, drawing, models, scenes, vocabulary
from diva_jax.world.scenes import Scenes

SEED, SEARCH_SEED = 9001, 8001  # Of the tests, and of the tests of the search of rates; training data has lower seeds.
PAIRS = 400  # Number of test pairs per fact.
_BATCH = 256
_PROBE_TRAIN, _PROBE_TEST = 2000, 1000  # Numbers of scenes.
_DECAY, _ITERATIONS = 1e-4, 100  # Weight decay and iterations of the linear probes.
# The classes of the names: two objects that differ in shape and colour.
_OBJECTS = tuple(itertools.product(range(len(scenes.COLOURS)), range(len(scenes.SHAPES))))
CLASSES = tuple((a, b) for a, b in itertools.combinations(_OBJECTS, 2) if a[0] != b[0] and a[1] != b[1])


@dataclasses.dataclass(frozen=True)
class Pairs:
    """P pairs, those of one fact after the other.

    Attributes:
      images: uint8 [P, 2, 16, 16, 3].
      texts: 2 P statements, two per pair, without "a photo of".
      pattern: [P], index into `scenes.FACTS`.
    """

    images: np.ndarray
    texts: list[str]
    pattern: np.ndarray


def differing(seed: int, fact: str, count: int) -> tuple[Scenes, Scenes, tuple[list[str], list[str]]]:
    """`count` scenes, the same with one fact changed, and statements of both that say this fact."""
    rng = np.random.default_rng((seed, scenes.FACTS.index(fact)))
    one = scenes.sample(rng, count)
    two = scenes.change(one, fact, rng)
    says = captions.only(rng, count, fact)
    return one, two, (captions.captions(one, says), captions.captions(two, says))


def pairs(seed: int = SEED, count: int = PAIRS) -> Pairs:
    """`count` pairs for each fact."""
    images, texts = [], []
    for fact in scenes.FACTS:
        one, two, said = differing(seed, fact, count)
        images.append(np.stack([drawing.draw(one), drawing.draw(two)], axis=1))
        texts += [text for both in zip(*said, strict=True) for text in both]
    return Pairs(np.concatenate(images), texts, np.repeat(np.arange(len(scenes.FACTS)), count))


def write_pairs(folder: Path, seed: int = SEED, count: int = PAIRS) -> None:
    """Writes pairs as MMVP-VLM is: Questions.csv and images, with Patterns.json, which names the patterns."""
    found = pairs(seed, count)
    root = folder / mmvp.FOLDERS[1]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "Questions.csv", "w", encoding="utf-8", newline="") as f:
        rows = csv.writer(f, lineterminator="\n")
        rows.writerow(mmvp.HEADER)
        for i, text in enumerate(found.texts):
            fact = scenes.FACTS[found.pattern[i // 2]]
            rows.writerow([i + 1, fact, text])
            (root / fact).mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(found.images[i // 2, i % 2])
            image.save(root / fact / f"{i + 1}.jpg", quality=98, subsampling=0)
    (folder / mmvp.NAMES).write_text(json.dumps({"patterns": list(scenes.FACTS), "pairs": count}, indent=1) + "\n")


def classes(s: Scenes) -> np.ndarray:
    """The index into `CLASSES` of each scene, [N]."""
    numbers = {c: i for i, c in enumerate(CLASSES)}
    objects = np.stack([s.colour, s.shape], axis=2).tolist()
    return np.array([numbers[tuple(sorted(map(tuple, both)))] for both in objects])


def labels(s: Scenes) -> dict[str, np.ndarray]:
    """Fact -> its value, int [N]; what probes are fitted to. "near" is of the left or upper object of the two:
    an embedding from which it can be read shows which object is where, and which colour belongs to it."""
    near = {f"near {name}": scenes.near(s, getattr(s, name)) for name in ("colour", "shape")}
    return {fact: a.astype(int) for fact, a in ({"relation": s.relation} | near).items()}


@dataclasses.dataclass(frozen=True)
class Tests:
    """The data of all tests; the same for every encoder."""

    pairs: Pairs
    train: Scenes
    test: Scenes
    train_images: np.ndarray
    test_images: np.ndarray

    @classmethod
    def make(cls, seed: int = SEED, count: int = PAIRS) -> "Tests":
        """The tests of a seed, with `count` pairs per fact."""
        sizes = enumerate((_PROBE_TRAIN, _PROBE_TEST))
        a, b = (scenes.sample(np.random.default_rng((seed, 100 + i)), n) for i, n in sizes)
        return cls(pairs(seed, count), a, b, drawing.draw(a), drawing.draw(b))

    def statements(self) -> list[str]:
        """All texts of the tests: those of the pairs, then one for each of `CLASSES`."""
        named = [" and ".join(captions.named(*thing) for thing in both) for both in CLASSES]
        return [f"{captions.PREFIX} {text}" for text in (*self.pairs.texts, *named)]


class Encoder:
    """Both towers of a CLIP of the world, compiled once; weights are arguments.

    Args:
      source: its folder.
    """

    def __init__(self, source: str = ""):
        source = source or models.SPEC.source
        spec = dataclasses.replace(models.SPEC, source=source)
        skeletons = {tower: partition.disassemble(names.abstract(tower, spec))[0] for tower in names.TOWERS}

        def vision(arrays, images):
            view = preprocess.normalise(preprocess.to_float(images), spec.mean, spec.std)
            return skeletons["vision"].merge(arrays).encode(view).pooled

        self._run = {
            "vision": jax.jit(vision),
            "text": jax.jit(lambda arrays, ids: skeletons["text"].merge(arrays).encode(ids)),
        }
        loaded = {k: partition.disassemble(parts.load(source, spec, tower=k))[1] for k in names.TOWERS}
        self.vision, self.text = loaded["vision"], loaded["text"]
        self._tokenizer = vocabulary.remembering(tokenizers.open_tokenizer(spec.text, source))

    def _batches(self, tower: str, arrays, x: np.ndarray) -> np.ndarray:
        padded = np.concatenate([x, np.zeros((-len(x) % _BATCH, *x.shape[1:]), x.dtype)])
        out = [self._run[tower](arrays, padded[i : i + _BATCH]) for i in range(0, len(padded), _BATCH)]
        return encode.unit(np.concatenate([np.asarray(o) for o in out])[: len(x)])

    def images(self, images: np.ndarray, vision: Mapping | None = None) -> np.ndarray:
        """Images uint8 [N, 16, 16, 3] -> embeddings of length one [N, D]; `vision`: in place of the source's."""
        return self._batches("vision", self.vision if vision is None else vision, images)

    def texts(self, texts: list[str], text: Mapping | None = None) -> np.ndarray:
        """Texts -> embeddings of length one [N, D]; `text`: other weights than the source's."""
        return self._batches("text", self.text if text is None else text, self._tokenizer(texts))


def measure(tests: Tests, images: Callable[[np.ndarray], np.ndarray], texts: np.ndarray) -> dict[str, np.ndarray]:
    """Runs all tests.

    Args:
      tests: the data.
      images: images -> embeddings of length one, see `Encoder`.
      texts: the embeddings of `tests.statements()`.

    Returns:
      test -> 0 or 1 per item: for each fact "pairs/FACT", "texts/FACT", "groups/FACT" and "matches/FACT", "names", and
      for each of `labels` "linear/FACT".
    """
    p, x, y = tests.pairs, images(tests.train_images), images(tests.test_images)
    found = images(p.images.reshape(-1, *p.images.shape[2:]))
    said, named = np.split(texts, [len(p.texts)])
    right = stats.answers(mmvp.pair_scores(found, said), mmvp.OWN)
    out = {
        f"{stats.ANSWERS[kind]}/{fact}": values[p.pattern == i]
        for kind, values in right.items()
        for i, fact in enumerate(scenes.FACTS)
    }
    out["names"] = (y @ named.T).argmax(axis=1) == classes(tests.test)
    truth = labels(tests.test)
    for fact, value in labels(tests.train).items():
        weights, biases = fit(x, value, int(value.max()) + 1, _DECAY, _ITERATIONS)
        out[f"linear/{fact}"] = (y @ weights + biases).argmax(axis=1) == truth[fact]
    return {name: np.asarray(a, np.float64) for name, a in out.items()}


def _main() -> None:
    out = world.folder(flags.FLAGS.out, "data/world_pairs")
    formats.refuse_taken(out)
    write_pairs(out, count=flags.FLAGS.pairs)
    print(f"wrote {flags.FLAGS.pairs} pairs for each of {len(scenes.FACTS)} facts to {out}")


if __name__ == "__main__":
    flags.DEFINE_integer("pairs", 40, "Pairs for each fact.", 1)
    world.run(_main, "Folder for the pairs.")
