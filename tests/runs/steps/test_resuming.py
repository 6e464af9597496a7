"""Anchor and moving average, resuming bit for bit, and runs that begin with another run's parameters."""

import importlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from e2e_config import get_config
from flax import nnx
from helpers import within

from diva_jax import demo, objectives
from diva_jax.common.errors import UserError
from diva_jax.data import preprocess
from diva_jax.demo import pack_photos
from diva_jax.models import backbones
from diva_jax.models.diffusion.vae import VAE
from diva_jax.models.layers import Keys
from diva_jax.objectives import genhancer
from diva_jax.training import checkpoint, workdirs
from diva_jax.training.loop import Run
from diva_jax.weights import names, origins, writers
from diva_jax.world import models, records


def rotations(folder="none", **fields):
    """A config of an objective that compiles in a moment."""
    return small.with_fields(get_config(f"outside.rotations:{folder}"), fields)


def test_defaults_have_neither():
    plain = small.program(rotations())
    assert set(plain.abstract_state(0)) == {"params", "opt", "step", "key"}
    both = small.program(rotations(anchor__weight=0.5, ema__decay=0.9))
    more = set(both.arrays) - set(plain.arrays)
    assert {n.removeprefix("anchor/") for n in more} == {
        n.removeprefix("vision/") for n in plain.arrays if n.startswith("vision/")
    }
    assert both.trained == plain.trained and set(both.abstract_state(0)["ema"]) == set(plain.trained)
    assert set(plain.objective.pretrained()) == set(both.objective.pretrained()) - {"anchor"}
    assert both.objective.pretrained()["anchor"].source == plain.config.backbone.source
    # Also where the table would train everything.
    c = rotations(anchor__weight=0.5, trainable=((".*", 1.0),))
    assert not [n for n in small.program(c).trained if n.startswith("anchor/")]


def test_anchor_by_hand():
    """Value and gradient are the plain objective's, plus 2 w (e - e0) / B through the encoder, of a larger image."""
    weight, b = 0.3, 4
    p, plain = (small.program(rotations(batch_size=b, anchor__weight=w)) for w in (weight, 0.0))
    arrays = small.random_arrays(p)
    keys = jax.random.split(jax.random.key(1), b)
    batch = {"image": np.random.default_rng(2).integers(0, 256, (b, 24, 24, 3)).astype(np.uint8)}
    mine = {n: arrays[n] for n in p.trained}

    def loss(program, trained):
        return program.skeleton.merge(arrays, trained).loss(batch, keys)

    (value, metrics), grads = jax.jit(jax.value_and_grad(lambda t: loss(p, t), has_aux=True))(mine)
    (base, _), want = jax.jit(jax.value_and_grad(lambda t: loss(plain, t), has_aux=True))(mine)
    s = small.SPEC
    view = preprocess.resize(preprocess.to_float(batch["image"]), s.image_size, "cubic", antialias=True)
    view = preprocess.normalise(view, s.mean, s.std)
    module = p.skeleton.merge(arrays)
    untuned = module.anchor.encode(view).pooled
    tuned, pull = jax.vjp(lambda t: p.skeleton.merge(arrays, t).vision.encode(view).pooled, mine)
    far = np.square(np.asarray(tuned) - np.asarray(untuned)).sum(axis=1).mean()
    assert far > 0.1
    np.testing.assert_allclose(metrics["anchor"], far, rtol=1e-5)
    np.testing.assert_allclose(value, base + weight * far, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], base, rtol=1e-5)
    (term,) = pull(2 * weight * (tuned - untuned) / b)
    for name in mine:
        expected = np.asarray(want[name] + term[name])
        within(np.linalg.norm(grads[name] - expected), 1e-4 * np.linalg.norm(expected) + 1e-7, name)


def test_anchor_is_zero_at_the_start():
    """In bfloat16 too, as the copy is computed as the encoder is, from weights held in fewer bits."""
    c = rotations(anchor__weight=1.0, dtype="bfloat16", frozen_dtype="bfloat16")
    p = small.program(c)
    arrays = small.random_arrays(p)
    for name in p.arrays:
        if name.startswith("anchor/"):
            arrays[name] = arrays["vision/" + name.removeprefix("anchor/")].astype(p.arrays[name].dtype)
    module = p.skeleton.merge(arrays)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 21, 21, 3)), jnp.float32)
    np.testing.assert_array_equal(module.vision.encode(x).pooled, module.anchor.encode(x).pooled)


def test_average_is_the_recursion_across_stages(monkeypatch):
    """In numpy, from the first values on; what the first stage does not train stays bit-identical."""
    head = objectives.Stage("head", 0, 2, 1e-2, (("head/.*", 1.0), (".*", 0.0)))
    both = lambda c: (head, objectives.tune(c, 2))  # noqa: E731
    monkeypatch.setattr(importlib.import_module("outside.rotations"), "stages", both, raising=False)
    c = rotations(steps=3, ema__decay=0.75, optim__warmup=0.0)
    states, p = (found := small.train(c, 4)).states, found.program
    assert [s.name for s in p.stages] == ["head", "tune"] and int(states[4]["step"]) == 4
    params = [state["params"] for state in states]
    assert {n for n, a in params[2].items() if not np.array_equal(a, params[0][n])} == {"head/kernel", "head/bias"}
    assert all(not np.array_equal(a, params[0][n]) for n, a in params[4].items())
    want = {n: a.astype(np.float64) for n, a in states[0]["params"].items()}
    for i, state in enumerate(states):
        if i:
            want = {n: 0.75 * a + 0.25 * state["params"][n] for n, a in want.items()}
        for name, array in state["ema"].items():
            np.testing.assert_allclose(array, want[name], rtol=1e-5, atol=1e-6, err_msg=name)
    for name, array in states[2]["ema"].items():
        if name.startswith("vision/"):
            np.testing.assert_array_equal(array, states[0]["params"][name], err_msg=name)


def resumed(c, tmp_path):
    """Runs of four steps, the second one from its checkpoint of step 2: (workdir, state, what is saved beside it)."""
    c.update(steps=4, compile_cache="")
    c.checkpoint.every, c.log.tensorboard = 2, False
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert Run(c, whole).run()
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "4")
    (again / "done").unlink()
    assert checkpoint.latest_step(again) == 2
    assert Run(c, again).run()

    def state(workdir):
        opened = Run(c, workdir)
        found, _, meta = checkpoint.restore(workdir, 4, opened.program.abstract_state(0))
        return found, meta

    (want, meta), (got, _) = state(whole), state(again)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    return whole, want, meta


def test_resumes_bit_identical_and_exports_the_average(files, tmp_path):
    """With both, on files: the second half again from a checkpoint; evaluation and export see the average."""
    c = rotations(files, anchor__weight=0.2, ema__decay=0.6)
    whole, want, meta = resumed(c, tmp_path)
    assert "anchor" in meta["sources"] and meta["sources"]["anchor"] == meta["sources"]["vision"]
    at = workdirs.RunAt.open(whole)
    for name, array in at.params.items():
        np.testing.assert_array_equal(array, want["ema"][name], err_msg=name)
        assert not np.array_equal(array, want["params"][name]), name
    source = origins.open_run(whole)
    name = "visual.proj"
    np.testing.assert_array_equal(source.tensors[name], np.asarray(want["ema"]["vision/proj/matrix"]))
    assert backbones.spec_of(at.config) == source.spec


OTHERS = [
    ("comclip", dict(batch_size=16, accum=2)),
    ("salm", dict(salm__teacher="self", ema__decay=0.6)),
    ("judge", dict(judge__verdict="shuffled", judge__count=3)),
]


@pytest.mark.parametrize("objective, fields", OTHERS)
def test_objectives_resume_bit_identical(objective, fields, tmp_path, capsys):
    """In the world; SALM's curriculum follows the step, and its teacher is in the checkpoint. The judge's texts, of
    those records that have any, follow from the position, its draws from the step."""
    c = small.with_fields(models.base_config(objective), dict(batch_size=8) | fields)
    c.data.path = records.path(3, count=30)
    _, state, _ = resumed(c, tmp_path)
    said = "compares the images of a micro-batch with each other: 8 at once, not the 16 of a step"
    assert (said in capsys.readouterr().out) == (objective == "comclip")
    assert any(n.startswith("adapter/") for n in state["params"]) == (objective == "salm")


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """fields -> config, whose files exist."""
    root = tmp_path_factory.mktemp("files")
    pack_photos(root / "photos", count=8, per_shard=8)
    demo.write_clip(root / "clip", small.SPEC_28)
    vae = VAE(genhancer._vae(small.genhancer_config().genhancer.vae), rngs=Keys(3))
    writers.write_safetensors(root / "ae.safetensors", names.to_torch(nnx.state(vae), names.FLUX_VAE))

    def config(**fields):
        c = small.genhancer_config(**fields)
        c.backbone.source, c.genhancer.vae.source = str(root / "clip"), str(root / "ae.safetensors")
        c.data.path, c.data.threads, c.log.tensorboard = str(root / "photos"), 1, False
        return c

    return config


def saved(run, step: int, change: float) -> dict:
    """Saves a checkpoint of a run whose trained parameters are changed, without training; returns what was loaded."""
    run.load()
    params = {n: a + change for n, a in run.state["params"].items()}
    meta = {"sources": run.origins, "config": {}} | ({"init_from": run.inherited} if run.inherited else {})
    state = {**run.state, "params": params, "step": run.state["step"] + step}
    with checkpoint.Checkpoints(run.workdir) as checkpoints:
        checkpoints.save(step, state, run.batches.get_state() | {"batches": step}, meta, wait=True)
    run.lock.close()
    run.batches.close()
    return {**run.frozen, **run.state["params"]}


def test_stage_two_starts_from_stage_one_and_resumes(make, tmp_path, capsys):
    first = Run(make(genhancer__stage2="none"), tmp_path / "one")
    before = saved(first, 3, 0.5)
    second = make(genhancer__stage1_steps=0, seed=4)
    run = Run(second, tmp_path / "two", f"{tmp_path}/one:3")
    after = saved(run, 2, 0.25)
    taken = [n for n in before if n.startswith(("project_", "denoiser/"))]
    assert f"{len(taken)} of {len(after)} parameters are those of --init_from={tmp_path}/one, step 3" in (
        capsys.readouterr().out
    )
    for name in after:
        if name in taken:
            np.testing.assert_array_equal(after[name], before[name] + 0.5, err_msg=name)
        elif "/lora/" not in name:
            np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    # Resuming: what is frozen comes from the first run again, whatever --init_from says.
    resumed = Run(second, tmp_path / "two", "nowhere")
    resumed.load()
    for name in taken:
        np.testing.assert_array_equal(resumed.frozen[name], after[name], err_msg=name)
    for name, array in resumed.state["params"].items():
        np.testing.assert_array_equal(array, after[name] + 0.25, err_msg=name)
    assert resumed.inherited["step"] == 3 and resumed.inherited["frozen"] == sorted(taken)
    resumed.batches.close()
    assert set(workdirs.RunAt.open(tmp_path / "two").towers()) == {"vision"}


def test_a_run_of_other_models_is_refused(make, tmp_path):
    saved(Run(make(genhancer__stage2="none"), tmp_path / "one"), 3, 0.0)
    other = make(genhancer__stage1_steps=0)
    with pytest.raises(UserError, match="--init_from=.*:7 has no checkpoint"):
        Run(other, tmp_path / "two", f"{tmp_path}/one:7")
    parent = workdirs.Parent.open(f"{tmp_path}/one")
    with pytest.raises(UserError, match="no parameter there .* has the name and shape of one of this config"):
        parent.matching({"unet/kernel": jax.ShapeDtypeStruct((3, 3), np.float32)})
    with pytest.raises(UserError, match="not the checkpoint that this run began with"):
        workdirs.Parent.recorded(parent.record([]) | {"sha256": "0"})
    assert not (tmp_path / "two").exists()
