"""Probes of the frozen encoder: a linear classifier as CLIP_benchmark's, and nearest neighbours as DINO's, fitted on
the pooled embeddings of a training split, of length one, and scored on a test split."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from diva_jax.common import paths
from diva_jax.common.errors import UserError, listing
from diva_jax.common.fields import above, at_least, between, field
from diva_jax.data import labelled
from diva_jax.evals import AT, QUERIES, ClassificationTask, Classified, Settings, encode, resolved
from diva_jax.evals.tasks import zeroshot

DECAYS = np.logspace(-6, 2, 97)  # Those of CLIP (arXiv 2103.00020, appendix A.3) and CLIP_benchmark.
_COARSE = 16  # The stride of the first round: logspace(-6, 2, 7).
_ROWS = 2**14  # Rows whose logits are held at once.
_TOLERANCE = 1e-6  # The search ends when no element of the gradient is larger.
_MAX_CLASSES = 10**5  # The weights and logits of all classes are held in memory.


@partial(jax.jit, static_argnames=("classes", "iterations"))
def _minimise(x, y, kept, decay, *, classes: int, iterations: int):
    """The weights and biases [D + 1, C] of `fit`; x [S, R, D], y and kept (1, or 0 for padding) [S, R]."""
    rows = kept.sum()

    def loss(table):
        def step(total, chunk):
            x, y, kept = chunk
            logits = jnp.matmul(x, table[:-1], precision="highest") + table[-1]
            own = jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]
            return total + (kept * (jax.nn.logsumexp(logits, axis=1) - own)).sum(), None

        total, _ = jax.lax.scan(jax.checkpoint(step), jnp.zeros((), table.dtype), (x, y, kept))
        return total / rows + decay / 2 * (table[:-1] ** 2).sum()

    solver = optax.lbfgs(memory_size=10)

    def iterate(carry):
        table, state, count, _ = carry
        value, gradient = optax.value_and_grad_from_state(loss)(table, state=state)
        updates, state = solver.update(gradient, state, table, value=value, grad=gradient, value_fn=loss)
        table = optax.apply_updates(table, updates)
        return table, state, count + 1, jnp.abs(optax.tree.get(state, "grad")).max()

    table = jnp.zeros((x.shape[-1] + 1, classes), x.dtype)
    first = (table, solver.init(table), 0, jnp.inf)
    return jax.lax.while_loop(lambda c: (c[2] < iterations) & (c[3] > _TOLERANCE), iterate, first)[0]


def fit(x: np.ndarray, y: np.ndarray, classes: int, decay: float, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """Logistic regression of features [N, D] and labels [N], 0 to C - 1: weights [D, C] and biases [C], float64, that
    minimise the mean cross-entropy + decay / 2 |W|^2; biases are not decayed. It is scikit-learn's LogisticRegression
    with C = 1 / (decay N). L-BFGS has at most `iterations`."""
    n = len(x)
    rows = min(_ROWS, n)
    pad = -n % rows

    def chunks(a, dtype):
        a = np.pad(np.asarray(a, dtype), ((0, pad), *[(0, 0)] * (a.ndim - 1)))
        return jnp.asarray(a.reshape(-1, rows, *a.shape[1:]))

    data = chunks(x, np.float32), chunks(y, np.int32), chunks(np.ones(n), np.float32)
    table = np.asarray(_minimise(*data, jnp.float32(decay), classes=classes, iterations=iterations), np.float64)
    return table[:-1], table[-1]


def search(accuracy: Callable[[int], float]) -> int:
    """The number of the best weight decay in `DECAYS`, by CLIP_benchmark's rule; `accuracy` is called once per number.
    Every 16th is tried, then the neighbours of the best at distances of 8, 4, 2 and 1; among equals the one tried
    first, which of three neighbours is the left one."""
    seen: dict[int, float] = {}

    def peak(numbers) -> int:
        best, most = 0, 0.0
        for i in numbers:
            if i not in seen:
                seen[i] = accuracy(i)
            if seen[i] > most:
                best, most = i, seen[i]
        return best

    best, span = peak(range(0, len(DECAYS), _COARSE)), _COARSE // 2
    while span:
        best = peak((max(best - span, 0), best, min(best + span, len(DECAYS) - 1)))
        span //= 2
    return best


@partial(jax.jit, static_argnames=("k", "classes"))
def _votes(queries, x, y, temperature, *, k: int, classes: int):
    similar, nearest = jax.lax.top_k(jnp.matmul(queries, x.T, precision="highest"), k)
    # Relative to the nearest, which does not change the order and does not overflow.
    weights = jnp.exp((similar - similar[:, :1]) / temperature)
    return (weights[..., None] * jax.nn.one_hot(y[nearest], classes)).sum(axis=1)


def neighbours(
    queries: np.ndarray, x: np.ndarray, y: np.ndarray, classes: int, k: int, temperature: float
) -> np.ndarray:
    """Votes [Q, C] for unit queries [Q, D], up to a factor per query, of the k nearest unit rows x [N, D] with labels y
    [N], each with weight exp(cosine / temperature) (DINO, arXiv 2104.14294)."""
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32)
    parts = [
        np.asarray(_votes(jnp.asarray(q, jnp.float32), x, y, jnp.float32(temperature), k=k, classes=classes))
        for q in np.split(queries, range(QUERIES, len(queries), QUERIES))
    ]
    return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class ProbeOptions:
    """The section `config.eval.probe`."""

    neighbours: int = field(20, "This many nearest neighbours vote.", at_least(1))
    temperature: float = field(0.07, "The temperature of the neighbours' votes.", above(0))
    weight_decay: float = field(
        0.0, "The weight decay of the linear probe; 0: it is searched on a part of the training split.", at_least(0)
    )
    held_out: float = field(
        0.2, "The weight decay is searched on this share of the training split, drawn by the seed.", between(0.01, 0.99)
    )
    iterations: int = field(1000, "The linear probe is fitted with at most this many steps of L-BFGS.", at_least(1))


def splits(path: str) -> tuple[str, str]:
    """(the training split, the test split) of a data path: `train=PATH,test=PATH`, or a folder with the folders `train`
    and `test` (or `val`). A UserError where it is neither, or both splits are the same."""
    if path.startswith("train="):
        train, _, test = path.removeprefix("train=").partition(",test=")
        if not train or not test or train == test:
            wrong = "names one split twice" if train and test else "has one split alone"
            raise UserError(f"--data=probe={path} {wrong}: it must read train=PATH,test=PATH")
        return train, test
    root = paths.expanded(path)
    name = next((name for name in ("test", "val") if (root / name).is_dir()), None)
    if name is None or not (root / "train").is_dir():
        raise UserError(f"{root} has no folders train and test: give one that has, or train=PATH,test=PATH")
    return str(root / "train"), str(root / name)


def _check_labels(train: labelled.Images, test: labelled.Images) -> None:
    """Raises a UserError where the splits do not have the same classes; names the image."""
    if train.classes and test.classes and train.classes != test.classes:
        strange = sorted(set(train.classes) ^ set(test.classes)) or ["their order"]
        raise UserError(f"the training and the test split differ in the classes {listing(strange, 5)}: give equal ones")
    known = set(train.targets)
    for name, label in zip(test.names, test.targets, strict=True):
        if label not in known:
            raise UserError(f"{name} of the test split has the label {label}, which no training image has: correct it")
    if min(known) < 0 or max(known) >= _MAX_CLASSES or len(known) < 2:
        labels = f"labels from 0 to {_MAX_CLASSES - 1}"
        raise UserError(f"a probe needs at least two classes, with {labels}: correct the training split")


class Probe(ClassificationTask):
    """The task on `path`, see `splits`; each split as for `zeroshot`: class folders, tars or tfds."""

    title = "Probes"

    def __init__(self, path: str, section: ConfigDict, settings: Settings):
        self.options, self.settings = ProbeOptions(**section), settings
        given = splits(path)
        self.train, self.test = (zeroshot.open_data(p, "probe") for p in given)
        _check_labels(self.train, self.test)
        self.train_labels = np.asarray(self.train.targets)
        if (k := self.options.neighbours) > len(self.train):
            raise UserError(f"config.eval.probe.neighbours={k} is more than the {len(self.train)} training images")
        self.data = "train={},test={}".format(*map(resolved, given))
        self._labels = int(self.train_labels.max()) + 1
        names = self.test.classes or []
        names = [*names, *map(str, range(len(names), self._labels))]
        titles = {"linear_": "linear probe", "knn_": f"{k} nearest neighbours"}
        self.set_classified({k: Classified(title, self.test, names, self._labels >= AT) for k, title in titles.items()})
        self.count = len(self.test)

    def _weight_decay(self, x: np.ndarray) -> float:
        """The option, or the decay with the best accuracy on the held-out part of the training split."""
        if self.options.weight_decay:
            return self.options.weight_decay
        order = np.random.default_rng(self.settings.seed).permutation(len(x))
        count = min(max(1, round(self.options.held_out * len(x))), len(x) - 1)
        held, kept = order[:count], order[count:]

        def accuracy(number: int) -> float:
            logits = self._linear(x[kept], self.train_labels[kept], DECAYS[number], x[held])
            return float((logits.argmax(axis=1) == self.train_labels[held]).mean())

        return float(DECAYS[search(accuracy)])

    def _linear(self, x: np.ndarray, y: np.ndarray, decay: float, queries: np.ndarray) -> np.ndarray:
        """Logits of the queries, [Q, C]."""
        weights, biases = fit(x, y, self._labels, decay, self.options.iterations)
        return queries @ weights + biases

    def answer(self, model):
        """Both probes: the predicted class of every test image."""
        train, test = (encode.unit(model.images(s.read, len(s))["pooled"]) for s in (self.train, self.test))
        decay, o = self._weight_decay(train), self.options
        outputs = {
            "linear_": self._linear(train, self.train_labels, decay, test),
            "knn_": neighbours(test, train, self.train_labels, self._labels, o.neighbours, o.temperature),
        }
        return *self.classify(outputs.items()), {"weight_decay": decay, "training_images": len(self.train)}


SECTION, prepare = ProbeOptions, Probe
