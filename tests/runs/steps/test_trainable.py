"""Any part of the objective can be trained: its gradient is that of the plain sum over draws."""

import jax
import numpy as np
import pytest
import small

from diva_jax.objectives.shared import draws

TABLES = {
    "all": ((".*", 1.0),),
    "text_context": (("text_context", 1.0), (".*", 0.0)),
}


def plain(fn, inputs, drawn, weights):
    """`draws.weighted_sum` as it is defined."""
    count = len(weights)
    found = [fn(inputs, jax.tree.map(lambda d, k=k: d[k], drawn)) for k in range(count)]
    aux = jax.tree.map(lambda *a: jax.numpy.stack(a), *(a for _, a in found))
    return sum(w * value for w, (value, _) in zip(weights, found, strict=True)), aux


@pytest.mark.parametrize("passes", ["exact", "faithful"])
def test_gradients_of_every_part(monkeypatch, passes):
    p = small.program(small.small_config(batch_size=2, trainable=TABLES["all"], diva__backbone_passes=passes))
    arrays, batch = small.random_arrays(p), small.batch(p, 0, 2)
    keys = jax.random.split(jax.random.key(0), 2)

    def grads():
        return jax.jit(jax.grad(lambda a: p.skeleton.merge(a).loss(batch, keys)[0]))(arrays)

    got = grads()
    monkeypatch.setattr(draws, "weighted_sum", plain)
    for name, expected in grads().items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(got[name], expected, rtol=1e-3, atol=2e-5 * scale + 1e-9, err_msg=name)
    parts = {name.split("/")[0] for name, g in got.items() if np.abs(g).max() > 0}
    assert parts == {"vision", "visual_proj", "unet", "vae", "text_context"}


@pytest.mark.parametrize("what", TABLES)
def test_a_step_trains_what_the_table_names(what):
    p = small.program(small.small_config(batch_size=2, trainable=TABLES[what], optim__warmup=0.0))
    arrays = small.random_arrays(p)
    state = p.init_state(arrays)
    before = {n: np.array(a) for n, a in state["params"].items()}
    state, metrics = p.step(0)(state, {n: arrays[n] for n in p.abstract_frozen()}, small.batch(p, 0))
    assert np.isfinite(metrics["loss"])
    moved = {n.split("/")[0] for n, a in state["params"].items() if not np.array_equal(a, before[n])}
    assert moved == ({"vision", "visual_proj", "unet", "vae", "text_context"} if what == "all" else {what})
