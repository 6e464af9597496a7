"""What an encoder of the world sees: pairs that differ in one fact, probes of every fact, names of objects.

    python -m diva_jax.world.blindness --out=data/world_pairs     # the pairs in MMVP-VLM's layout
    python -m diva_jax.evaluate --config=configs/world.py --task=mmvp --data=data/world_pairs ...

All scenes are of seeds that no training data has. A pair is right where both of its texts choose the right one of its
two images, as in MMVP-VLM; both texts name the objects, their colours, and the fact in which the images differ.
"""

import csv
import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from diva_jax.common.errors import UserError
from diva_jax.data import preprocess, tokenizers
from diva_jax.evals import encode, linear, matching
from diva_jax.evals.tasks import mmvp
from diva_jax.models import backbones, layers
from diva_jax.models.backbones.shared.text import Text
from diva_jax.training import partition
from diva_jax.weights import loading, writers
from diva_jax.world import captions, drawing, models, scenes
from diva_jax.world.scenes import Scenes

SEED = 9001  # Of the tests; those of training data are below.
PAIRS = 40  # Per pattern.
_BATCH = 128
_PROBE_TRAIN, _PROBE_TEST = 1600, 800  # Scenes.
_DECAY, _ITERATIONS = 1e-4, 100  # Of the linear probes.
_NEIGHBOURS, _TEMPERATURE = 20, 0.07
_NAMED = 350  # Images of one object whose shape is named.


@dataclasses.dataclass(frozen=True)
class Pairs:
    """P pairs, those of one pattern after the other.

    Attributes:
      images: uint8 [P, 2, 32, 32, 3].
      texts: 2 P statements, two per pair, without "a photo of".
      pattern: [P], index into `scenes.FACTS`.
    """

    images: np.ndarray
    texts: list[str]
    pattern: np.ndarray


def having(rng: np.random.Generator, fact: str, count: int) -> Scenes:
    """`count` scenes that have a fact, see `scenes.has`."""
    drawn = scenes.sample(rng, 8 * count + 64)
    return drawn.take(np.flatnonzero(scenes.has(drawn, fact))[:count])


def pairs(seed: int = SEED, count: int = PAIRS) -> Pairs:
    """`count` pairs for each fact."""
    images, texts = [], []
    for number, fact in enumerate(scenes.FACTS):
        rng = np.random.default_rng((seed, number))
        one = having(rng, fact, count)
        two = scenes.change(one, fact, rng)
        says = captions.only(rng, count, fact)
        images.append(np.stack([drawing.draw(one), drawing.draw(two)], axis=1))
        for both in zip(captions.captions(one, says), captions.captions(two, says), strict=True):
            texts += both
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


def labels(s: Scenes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Fact -> (the scenes that have it, bool [N]; its value, int [N]); what probes are fitted to.

    "left shape" and "left colour" are of the left or upper object of a pair: who reads them knows which object is
    where, and which colour belongs to it.
    """
    group, rows = s.group == 1, np.arange(len(s))
    near = np.where(s.relation % 2 == 0, 0, 1)  # The object that is left or above.
    found = {
        "shape": (group, s.shape[:, 0]),
        "colour": (group, s.colour[:, 0]),
        "size": (group, s.size[:, 0]),
        "texture": (group, s.texture[:, 0]),
        "feature": (group, s.hole[:, 0]),
        "orientation": (scenes.has(s, "orientation"), s.direction[:, 0]),
        "count": (group, s.count - 1),
        "state": (np.ones(len(s), bool), s.time),
        "left shape": (~group, s.shape[rows, near]),
        "left colour": (~group, s.colour[rows, near]),
    }
    return {fact: (mask, value.astype(int)) for fact, (mask, value) in found.items()}


@dataclasses.dataclass(frozen=True)
class Tests:
    """The data of all tests; the same for every encoder."""

    pairs: Pairs
    train: Scenes
    test: Scenes
    train_images: np.ndarray
    test_images: np.ndarray
    named: np.ndarray
    names: np.ndarray

    @classmethod
    def make(cls, seed: int = SEED, count: int = PAIRS, train: int = 0, test: int = 0) -> "Tests":
        """The tests of a seed.

        Args:
          seed: of the scenes.
          count: pairs per pattern.
          train, test: scenes that the probes are fitted to and scored on; 0: as in the experiment.
        """
        train, test = train or _PROBE_TRAIN, test or _PROBE_TEST
        a, b = (scenes.sample(np.random.default_rng((seed, 100 + i)), n) for i, n in enumerate((train, test)))
        single = scenes.sample(np.random.default_rng((seed, 102)), 12 * _NAMED)
        single = single.take(np.flatnonzero((single.group == 1) & (single.count == 1))[:_NAMED])
        drawn = [drawing.draw(s) for s in (a, b, single)]
        return cls(pairs(seed, count), a, b, *drawn, single.shape[:, 0].astype(int))


class Encoder:
    """The towers of `models.SPEC`, compiled once; weights are arguments."""

    def __init__(self, source: str = ""):
        source = source or models.SPEC.source
        spec = dataclasses.replace(models.SPEC, source=source)
        makers = {"vision": partial(backbones.build, spec), "text": partial(Text, spec)}
        skeletons = {
            k: partition.disassemble(layers.abstract(lambda rngs, m=m: m(rngs=rngs)))[0] for k, m in makers.items()
        }

        def vision(arrays, images):
            view = preprocess.normalise(preprocess.to_float(images), spec.mean, spec.std)
            return skeletons["vision"].merge(arrays).encode(view).pooled

        self._run = {
            "vision": jax.jit(vision),
            "text": jax.jit(lambda arrays, ids: skeletons["text"].merge(arrays).encode(ids)),
        }
        loaded = {k: partition.disassemble(loading.load(source, spec, tower=k))[1] for k in makers}
        self.vision, self.text = loaded["vision"], loaded["text"]
        self._tokenizer = tokenizers.open_tokenizer(spec.text, source)

    def _batches(self, tower: str, arrays, x: np.ndarray) -> np.ndarray:
        padded = np.concatenate([x, np.zeros((-len(x) % _BATCH, *x.shape[1:]), x.dtype)])
        out = [self._run[tower](arrays, padded[i : i + _BATCH]) for i in range(0, len(padded), _BATCH)]
        return encode.unit(np.concatenate([np.asarray(o) for o in out])[: len(x)])

    def images(self, images: np.ndarray, vision: Mapping | None = None) -> np.ndarray:
        """Images uint8 [N, 32, 32, 3] -> embeddings of length one [N, D]; `vision`: in place of the source's."""
        return self._batches("vision", self.vision if vision is None else vision, images)

    def texts(self, texts: list[str], text: Mapping | None = None) -> np.ndarray:
        """Texts -> embeddings of length one [N, D]; `text`: other weights than the source's."""
        return self._batches("text", self.text if text is None else text, self._tokenizer(texts))


def measure(
    tests: Tests, images: Callable[[np.ndarray], np.ndarray], texts: Callable[[list[str]], np.ndarray]
) -> dict[str, np.ndarray]:
    """Runs all tests.

    Args:
      tests: the data.
      images, texts: images, texts -> embeddings of length one, see `Encoder`.

    Returns:
      test -> 0 or 1 per item: "pairs", "texts", "groups" and "matches" [P], "zeroshot", and for each fact of `labels`
      "linear/FACT" and "knn/FACT".
    """
    p = tests.pairs
    found = images(p.images.reshape(-1, *p.images.shape[2:]))
    right = matching.answers(mmvp.pair_scores(found, texts([f"a photo of {t}" for t in p.texts])), mmvp.OWN)
    out = {matching.ANSWERS[kind]: values for kind, values in right.items()}
    names = texts([f"a photo of a {name}" for name in scenes.SHAPES])
    out["zeroshot"] = (images(tests.named) @ names.T).argmax(axis=1) == tests.names
    x, y = images(tests.train_images), images(tests.test_images)
    truth = labels(tests.test)
    for fact, (kept, value) in labels(tests.train).items():
        there, right = truth[fact]
        classes = int(value.max()) + 1
        weights, biases = linear.fit(x[kept], value[kept], classes, _DECAY, _ITERATIONS)
        out[f"linear/{fact}"] = (y[there] @ weights + biases).argmax(axis=1) == right[there]
        votes = linear.neighbours(y[there], x[kept], value[kept], classes, _NEIGHBOURS, _TEMPERATURE)
        out[f"knn/{fact}"] = votes.argmax(axis=1) == right[there]
    return {name: np.asarray(a, np.float64) for name, a in out.items()}


def summary(found: Mapping[str, np.ndarray], pattern: np.ndarray) -> dict[str, float]:
    """Percent: each test, "linear" and "knn" (means over facts), and "pairs/FACT", "matches/FACT" and so on."""
    out = {name: a.mean() for name, a in found.items()}
    for kind in ("linear", "knn"):
        out[kind] = np.mean([a.mean() for name, a in found.items() if name.startswith(f"{kind}/")])
    for kind in matching.ANSWERS.values():
        out |= {f"{kind}/{fact}": found[kind][pattern == i].mean() for i, fact in enumerate(scenes.FACTS)}
    return {name: round(100 * float(value), 2) for name, value in out.items()}


def _main() -> None:
    out = flags.FLAGS.out
    if not out:
        raise UserError("--out is missing: give a folder for the pairs, e.g. --out=data/world_pairs")
    writers.refuse_taken(out)
    write_pairs(Path(out), count=flags.FLAGS.pairs)
    print(f"wrote {flags.FLAGS.pairs} pairs for each of {len(scenes.FACTS)} facts to {out}")


if __name__ == "__main__":
    from absl import flags

    from diva_jax.common import cli

    # Here and not above: other modules of this package define --out as well.
    flags.DEFINE_string("out", None, "Folder for the pairs.")
    flags.DEFINE_integer("pairs", PAIRS, "Pairs for each fact.", 1)
    cli.run(_main)
