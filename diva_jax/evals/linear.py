"""Multinomial logistic regression by L-BFGS, the search for its weight decay, and weighted nearest neighbours."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

DECAYS = np.logspace(-6, 2, 97)  # Of the search, as CLIP (arXiv 2103.00020, appendix A.3) and CLIP_benchmark.
_COARSE = 16  # The stride of the first round: logspace(-6, 2, 7).
_ROWS = 2**14  # Rows whose logits are held at once.
_QUERIES = 256
_TOLERANCE = 1e-6  # Of the largest element of the gradient.


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
        for q in np.split(queries, range(_QUERIES, len(queries), _QUERIES))
    ]
    return np.concatenate(parts)
