"""KUEA: what follows from its equations, and the teacher's input."""

import jax
import numpy as np
import pytest
import small
from helpers import within

from diva_jax import config
from diva_jax.common.errors import UserError
from diva_jax.data import preprocess
from diva_jax.training.loop import Run


def test_at_the_start_the_distance_to_the_original_is_zero():
    p = small.program(small.kuea_config(kuea__kernel="cosine", kuea__kernel_params="faithful"))
    arrays = small.kuea_arrays(p)
    arrays |= {n: arrays[n.replace("original/", "vision/")] for n in arrays if n.startswith("original/")}
    batch = small.batch(p, 0)

    def losses(trained):
        return p.skeleton.merge({**arrays, **trained}).loss(batch, None)

    trained = {n: arrays[n] for n in p.trained}
    (value, metrics), grads = jax.jit(jax.value_and_grad(losses, has_aux=True))(trained)
    within(metrics["loss_clean"], 1e-9)
    assert metrics["loss_kernel"] > 0
    assert value == pytest.approx(float(0.5 * metrics["loss_kernel"]), abs=1e-8)
    assert all(np.isfinite(g).all() for g in grads.values())


def test_the_teacher_has_its_own_input_or_the_backbones():
    exact = small.kuea_config()
    p, other = small.program(exact), small.program(config.faithful(exact.copy_and_resolve_references()))
    found, alone = p.objective.inputs, other.objective.inputs
    assert set(found) == {"image", "teacher"} and set(alone) == {"image"}
    assert [(x.size, x.resize) for x in (found["image"], found["teacher"], alone["image"])] == [
        (21, 0),
        (18, 24),
        (21, 0),
    ]
    batch, module = small.batch(p, 0), p.skeleton.merge(small.kuea_arrays(p))
    want, _ = module.forward(*(preprocess.to_float(batch[name]) for name in ("image", "teacher")))
    np.testing.assert_allclose(module.loss(batch, None)[0], want, rtol=1e-6)


def test_a_teacher_that_is_no_dinov2_is_refused_before_anything_is_written(files, tmp_path):
    c = config.faithful(small.kuea_config())
    c.batch_size, c.backbone.source, c.data.path = 8, str(files / "clip"), str(files / "photos")
    c.kuea.teacher.source = str(files / "clip")
    run = Run(c, tmp_path / "run")
    with pytest.raises(UserError, match="is of another architecture than config.kuea.teacher: arch is 'vit' there"):
        run.load()
    assert not (tmp_path / "run" / "config.json").exists()
