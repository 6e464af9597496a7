"""`diva_jax.objective`: loss and gradients are those of the train step, and a batch is checked."""

import jax
import numpy as np
import optax
import pytest
from e2e_config import get_config
from eval_data import patch
from helpers import refused

import diva_jax
from diva_jax.api import read_config
from diva_jax.data import images
from diva_jax.training.step import train_step


@pytest.fixture(scope="module")
def loss(files):
    """Of a head, over a tower that is frozen."""
    c = get_config(f"outside.rotations:{files}")
    c.trainable = (("head/.*", 1.0), (".*", 0.0))
    return diva_jax.objective(c)


def test_it_is_the_loss_and_the_gradient_of_training(loss):
    program = loss._program
    batch = loss.batch([patch(i) for i in range(8)], seed=3)
    found = loss(batch, step=2)
    assert found.metrics["loss"] == pytest.approx(found.loss, rel=1e-6)
    active = frozenset(program.active(0))
    assert set(found.gradients) == set(loss.params) == {"head/kernel", "head/bias"}
    assert all(n.startswith("vision/") for n in loss.frozen)
    # One step of plain gradient descent changes the parameters by the gradient.
    tx = optax.sgd(1.0)
    state = {
        "params": loss.params,
        "opt": tx.init({n: loss.params[n] for n in active}),
        "step": jax.numpy.int32(2),
        "key": program.init_state(loss.params)["key"],
    }
    rate = {"tx": lambda lr: tx, "rate": lambda pace: lambda step: 1.0}
    static = dict(skeleton=program.skeleton, active=active, accum=1, **rate)
    rows = {**batch, "row": np.arange(8, dtype=np.int32)}
    with jax.sharding.use_abstract_mesh(loss._mesh.abstract_mesh):
        new, metrics = jax.jit(lambda s, f, b: train_step(s, f, b, program.step(0).pace, **static))(
            state, loss.frozen, rows
        )
    assert found.loss == pytest.approx(float(metrics["loss"]), rel=1e-5)
    for name, gradient in found.gradients.items():
        want = np.asarray(loss.params[name]) - np.asarray(new["params"][name])
        np.testing.assert_allclose(np.asarray(gradient), want, atol=1e-5 + 1e-4 * np.abs(want).max())
    assert loss(batch, step=3).loss != found.loss
    changed = {n: 1.1 * a for n, a in loss.params.items()}
    assert loss(batch, changed, step=2).loss != found.loss


def test_batches_are_cropped_as_in_training(loss):
    c, image = loss.config.data.crop, patch(1)
    batch = loss.batch([image, image], seed=5)
    for i in range(2):
        rng = np.random.default_rng((5, i))
        box = images.sample_box(rng, *image.size, tuple(c.scale), tuple(c.ratio))
        np.testing.assert_array_equal(batch["image"][i], images.resized_crop(image, box, 21, c.interpolation))
    assert loss.inputs == {"image": ((21, 21, 3), np.dtype(np.uint8))}


def test_bad_batches_are_one_sentence(loss):
    good = loss.batch([patch(i) for i in range(8)])
    for batch, says in (
        ({}, "the batch lacks image: it must have image .uint8 .B, 21, 21, 3.."),
        (good | {"text": 1}, "the batch has text, which is no input"),
        ({"image": good["image"] / 255}, r"the input image is float64 .8, 21, 21, 3.: give uint8"),
        ({"image": good["image"][:, :10]}, r"is uint8 .8, 10, 21, 3."),
        (good | {"row": np.arange(8)}, "the input row is int64"),
        ({"image": good["image"][:5]}, "a batch of 5 cannot be split over 8 devices"),
        ({"image": good["image"][:0]}, "a batch of 0 cannot"),
    ):
        refused(says, loss, batch)
    for params, says in (
        ({n: a for n, a in loss.params.items() if n != "head/bias"}, "params lacks head/bias: give all of Loss.params"),
        (loss.params | {"head/scale": 1.0}, "params has head/scale"),
        (loss.params | {"head/bias": np.zeros(3)}, r"head/bias as float64 .3. and not as floats .4."),
        (loss.params | {"head/bias": np.zeros(4, int)}, "head/bias as int64"),
        ([1], "params=.1. is no mapping of names: give params=Loss.params"),
    ):
        refused(says, loss, good, params)
    refused("__call__ has no argument paramss; did you mean params", loss, good, paramss=1)
    refused("2 images need as many texts", lambda: loss.batch([patch(0), patch(1)], ["one"]))


def test_configs_as_arguments(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from diva_jax import config\ndef get_config(arg=None):\n    return config.default('vitl14')\n")
    found = read_config(path, {"optim.lr": 3e-4, "steps": 7})
    assert (found.optim.lr, found.steps, found.is_locked) == (3e-4, 7, True)
    assert read_config(found, {"steps": 8}).steps == 8 and found.steps == 7
    for given, fields, says in (
        (tmp_path / "none.py", {}, "none.py' does not exist: give a file, or the name of a config: "),
        (path, {"optim.learning_rate": 1}, "no field optim.learning_rate; did you mean optim.lr"),
        (path, {"steps": "many"}, "do not fit the config"),
        (path, [("steps", 3)], "no mapping of names: give fields=."),
        (3, {}, "config=3 is no config: give"),
    ):
        refused(says, read_config, given, fields)
    path.write_text("def get_config():\n    raise RuntimeError('no')\n")
    refused("mine.py does not make a config .RuntimeError: no", read_config, path)
