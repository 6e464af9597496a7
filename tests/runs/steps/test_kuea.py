"""KUEA: what follows from its equations, from several devices, and from configs that do not fit together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from helpers import within
from specs import DINOV2_REG
from traced import traced

from diva_jax import config
from diva_jax.common.errors import UserError
from diva_jax.models import backbones
from diva_jax.models.backbones.shared.transformer import patch_flops
from diva_jax.objectives import kuea
from diva_jax.training import optim
from diva_jax.training.loop import Run

SWITCHES = ("faithful", "exact")


def settings_of(mode="exact", **fields):
    c = config.default(small.SPEC, objective="kuea")
    c.update(batch_size=16, steps=5)
    c.optim.lr = 1e-3
    c.kuea.teacher.update(dataclasses.asdict(dataclasses.replace(DINOV2_REG, image_size=18)))
    c.kuea.update(teacher_crop_from=24, **fields)
    return config.faithful(c) if mode == "faithful" else c


def random_batch(p, seed=0):
    rng = np.random.default_rng(seed)
    made = {n: rng.integers(0, 256, a.shape).astype(a.dtype) for n, a in p.abstract_batch().items()}
    return jax.device_put(made | {"row": np.arange(len(made["row"]), dtype=np.int32)}, p.batch_sharding)


def arrays_of(p):
    arrays = small.random_arrays(p)
    return arrays | {n: jnp.asarray([0.03, 0.19]) for n in arrays if n == "kernel_params"}


def test_losses_do_not_depend_on_devices():
    c, losses = settings_of(), []
    for devices in (1, 8):
        p = small.program(c, devices)
        arrays = arrays_of(p)
        state = p.init_state({n: arrays[n] for n in p.trained})
        frozen = {n: arrays[n] for n in p.abstract_frozen()}
        for step in range(2):
            state, metrics = p.step(0)(state, frozen, random_batch(p, step))
            losses.append([float(metrics[k]) for k in ("loss", "loss_kernel", "lr")])
    np.testing.assert_allclose(losses[:2], losses[2:], rtol=1e-5)
    assert losses[0][2] == pytest.approx(1e-3)  # One step of warm-up, whichever way it is counted.


def test_at_the_start_the_distance_to_the_original_is_zero():
    c = settings_of(kernel="cosine", kernel_params="faithful")
    p = small.program(c)
    arrays = arrays_of(p)
    arrays |= {n: arrays[n.replace("original/", "vision/")] for n in arrays if n.startswith("original/")}
    batch = random_batch(p)

    def losses(trained):
        return p.skeleton.merge({**arrays, **trained}).loss(batch, None)

    trained = {n: arrays[n] for n in p.trained}
    (value, metrics), grads = jax.jit(jax.value_and_grad(losses, has_aux=True))(trained)
    within(metrics["loss_clean"], 1e-9)
    assert metrics["loss_kernel"] > 0
    assert value == pytest.approx(float(0.5 * metrics["loss_kernel"]), abs=1e-8)
    assert all(np.isfinite(g).all() for g in grads.values())


@pytest.mark.parametrize("seed", range(6))
def test_only_the_ratio_of_gamma_and_c_matters(seed):
    """So gamma dL/dgamma + c dL/dc = 0 for every L of the kernel; the diagonal is 1 and the kernel symmetric."""
    rng = np.random.default_rng(seed)
    count, width = rng.integers(2, 8), rng.integers(1, 10)
    gamma, c, factor = np.exp(rng.uniform(-4, 1)), np.exp(rng.uniform(-3, 1)), np.exp(rng.uniform(-2, 3))
    x, probe = rng.normal(size=(count, width)), rng.normal(size=(count, count))
    with jax.enable_x64(True):
        one = kuea.polynomial(jnp.asarray(x), gamma, c)
        np.testing.assert_allclose(one, kuea.polynomial(jnp.asarray(x), factor * gamma, factor * c), rtol=1e-9)
        np.testing.assert_allclose(np.diag(one), 1, rtol=1e-12)
        np.testing.assert_allclose(one, np.asarray(one).T, rtol=1e-12)
        a, b = jax.grad(lambda q: jnp.sum(probe * kuea.polynomial(jnp.asarray(x), *q)))((gamma, c))
        within(abs(gamma * a + c * b), 1e-9 * (1 + abs(gamma * a)))


def test_the_published_schedules():
    """The formula of open_clip; faithful has the peak at the first step alone."""
    c = config.default("vitl14", objective="kuea")
    stages = [kuea.stages(x)[0] for x in (c, config.faithful(c.copy_and_resolve_references()))]
    exact, faithful = (optim.learning_rate(s, optim.pace(s, c.optim.warmup)) for s in stages)
    steps = np.array([0, 1, 1399, 2799, 2800, 21400, 39999])
    want = 1e-5 * np.where(steps < 2800, (steps + 1) / 2800, 0.5 * (1 + np.cos(np.pi * (steps - 2800) / 37200)))
    np.testing.assert_allclose([exact(s) for s in steps], want, rtol=2e-5, atol=1e-12)
    want[0] = 1e-5
    np.testing.assert_allclose([faithful(s) for s in steps], want, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("mode", SWITCHES)
def test_inputs_follow_the_switches(mode):
    found = small.program(settings_of(mode)).objective.inputs
    assert set(found) == ({"image", "teacher"} if mode == "exact" else {"image"})
    assert (found["image"].size, found["image"].resize) == (21, 0)
    if mode == "exact":
        assert (found["teacher"].size, found["teacher"].resize) == (18, 24)


def test_flops_are_those_of_the_traced_program():
    p = small.program(settings_of())  # Faithful, the teacher's input is resized with products too.
    batch = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in p.abstract_batch().items()}
    shapes = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in p.arrays.items()}
    trained = {n: shapes.pop(n) for n in p.trained}

    def loss(trained, frozen, batch):
        return p.skeleton.merge(trained, frozen).loss(batch, None)[0]

    counted = traced(jax.make_jaxpr(jax.value_and_grad(loss))(trained, shapes, batch).jaxpr) / 16
    # The pixels have no gradient.
    assert counted == p.objective.flops() - patch_flops(p.objective.spec)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(kernel="linear"), "config.kuea.kernel='linear' must be polynomial or gaussian or cosine"),
        (dict(teacher_norm="both"), "config.kuea.teacher_norm='both' must be exact or faithful"),
        (dict(gamma=0.0), "config.kuea.gamma=0.0 must be above 0"),
        (dict(teacher_crop_from=17), "config.kuea.teacher_crop_from=17 must be at least"),
    ],
)
def test_bad_options_are_one_sentence(fields, says):
    c = settings_of()
    c.kuea.update(fields)
    with pytest.raises(UserError, match=says) as e:
        small.program(c)
    assert "\n" not in str(e.value)


def test_a_teacher_that_is_no_dinov2_is_refused_before_anything_is_written(files, tmp_path):
    c = settings_of("faithful")
    c.batch_size, c.backbone.source, c.data.path = 8, str(files / "clip"), str(files / "photos")
    c.kuea.teacher.source = str(files / "clip")
    run = Run(c, tmp_path / "run")
    with pytest.raises(UserError, match="is of another architecture than config.kuea.teacher: arch is 'vit' there"):
        run.load()
    assert not (tmp_path / "run" / "config.json").exists()


def test_the_published_teacher():
    assert (kuea.TEACHER.registers, kuea.TEACHER.patches, kuea.TEACHER.layers) == (4, 256, 24)
    assert backbones.architecture(kuea.TEACHER.arch).positions(kuea.TEACHER).antialias
    assert kuea.KueaOptions().teacher_crop_from == 256
