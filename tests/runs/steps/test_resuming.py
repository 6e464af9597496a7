"""Anchor and moving average, and runs that begin with another run's parameters."""

import importlib

import chex
import jax
import numpy as np
import small
from e2e_config import rotations
from helpers import refused

from diva_jax import objectives
from diva_jax.data import preprocess
from diva_jax.training import checkpoint, workdirs
from diva_jax.training.loop import Run
from diva_jax.weights import origins


def test_defaults_have_neither():
    plain = small.program(rotations())
    assert set(plain.abstract_state(0)) == {"params", "opt", "step", "key"}
    both = small.program(rotations(anchor__weight=0.5, ema__decay=0.9))
    more = set(both.arrays) - set(plain.arrays)
    assert more == {f"anchor/{n.removeprefix('vision/')}" for n in plain.arrays if n.startswith("vision/")}
    assert both.trained == plain.trained and set(both.abstract_state(0)["ema"]) == set(plain.trained)
    assert set(plain.objective.pretrained()) == set(both.objective.pretrained()) - {"anchor"}
    assert both.objective.pretrained()["anchor"].source == plain.config.backbone.source
    everything = small.program(rotations(anchor__weight=0.5, trainable=((".*", 1.0),)))
    assert not [n for n in everything.trained if n.startswith("anchor/")]


def test_anchor_by_hand():
    """Of a larger image; test_torch_training.py has the gradient. At the start it is zero, in bfloat16 too, as the copy
    is computed as the encoder is, from weights held in fewer bits."""
    p, plain = (small.program(rotations(batch_size=4, anchor__weight=w)) for w in (0.3, 0.0))
    arrays, keys, s = small.random_arrays(p), jax.random.split(jax.random.key(1), 4), small.SPEC
    batch = {"image": np.random.default_rng(2).integers(0, 256, (4, 24, 24, 3)).astype(np.uint8)}
    module = p.skeleton.merge(arrays)
    value, metrics = jax.jit(lambda arrays: p.skeleton.merge(arrays).loss(batch, keys))(arrays)
    without = {n: arrays[n] for n in plain.arrays}
    base, _ = jax.jit(lambda arrays: plain.skeleton.merge(arrays).loss(batch, keys))(without)
    view = preprocess.resize(preprocess.to_float(batch["image"]), s.image_size, "cubic", antialias=True)
    view = preprocess.normalise(view, s.mean, s.std)
    moved = np.asarray(module.vision.encode(view).pooled) - np.asarray(module.anchor.encode(view).pooled)
    far = np.square(moved).sum(axis=1).mean()
    assert far > 0.1
    np.testing.assert_allclose([metrics["anchor"], metrics["loss"], value], [far, base, base + 0.3 * far], rtol=1e-5)
    p = small.program(rotations(anchor__weight=1.0, dtype="bfloat16", frozen_dtype="bfloat16"))
    arrays = small.random_arrays(p)
    copies = {n: n.replace("anchor/", "vision/") for n in p.arrays if n.startswith("anchor/")}
    arrays |= {n: arrays[of].astype(p.arrays[n].dtype) for n, of in copies.items()}
    vision, anchor = (getattr(p.skeleton.merge(arrays), part) for part in ("vision", "anchor"))
    np.testing.assert_array_equal(vision.encode(view[:, :21, :21]).pooled, anchor.encode(view[:, :21, :21]).pooled)


def test_average_is_the_recursion_across_stages(monkeypatch):
    """In numpy, from the first values on; what the first stage does not train stays bit-identical."""
    head = objectives.Stage("head", 0, 2, 1e-2, (("head/.*", 1.0), (".*", 0.0)))
    both = lambda c: (head, objectives.tune(c, 2))  # noqa: E731
    monkeypatch.setattr(importlib.import_module("outside.rotations"), "stages", both, raising=False)
    states, p = (found := small.train(rotations(steps=3, ema__decay=0.75, optim__warmup=0.0), 4)).states, found.program
    assert [s.name for s in p.stages] == ["head", "tune"] and int(states[4]["step"]) == 4
    params = [state["params"] for state in states]
    assert {n for n, a in params[2].items() if not np.array_equal(a, params[0][n])} == {"head/kernel", "head/bias"}
    assert all(not np.array_equal(a, params[0][n]) for n, a in params[4].items())
    want = {n: a.astype(np.float64) for n, a in states[0]["params"].items()}
    for i, state in enumerate(states):
        if i:
            want = {n: 0.75 * a + 0.25 * state["params"][n] for n, a in want.items()}
        chex.assert_trees_all_close(state["ema"], want, rtol=1e-5, atol=1e-6)
    towers = ({n: a for n, a in of.items() if n.startswith("vision/")} for of in (states[2]["ema"], params[0]))
    chex.assert_trees_all_equal(*towers)


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


HEAD = (("head/.*", 1.0), (".*", 0.0))
REST = (("vision/.*", 1.0), (".*", 0.0))


def test_a_second_run_starts_from_the_first_and_resumes(files, tmp_path, capsys):
    before = saved(Run(rotations(files, trainable=HEAD), tmp_path / "one"), 3, 0.5)
    second = rotations(files, trainable=REST, seed=4)
    after = saved(Run(second, tmp_path / "two", f"{tmp_path}/one:3"), 2, 0.25)
    taken = [n for n in before if n.startswith("head/")]
    said = f"{len(taken)} of {len(after)} parameters are those of --init_from={tmp_path}/one, step 3"
    assert said in capsys.readouterr().out
    chex.assert_trees_all_equal(after, {n: a + 0.5 * (n in taken) for n, a in before.items()})
    # Resuming: what is frozen comes from the first run again, whatever --init_from says.
    resumed = Run(second, tmp_path / "two", "nowhere")
    resumed.load()
    assert f"=nowhere is not read again: this run began with {tmp_path}/one, step 3" in capsys.readouterr().out
    again = resumed.frozen | resumed.state["params"]
    chex.assert_trees_all_equal(again, {n: a + 0.25 * (n not in taken) for n, a in after.items()})
    assert resumed.inherited["step"] == 3 and resumed.inherited["frozen"] == sorted(taken)
    resumed.batches.close()
    assert origins.open_run(tmp_path / "two").run["taken"] == resumed.inherited
    assert set(workdirs.RunAt.open(tmp_path / "two").towers()) == {"vision"}


def test_a_run_of_other_models_is_refused(files, tmp_path):
    saved(Run(rotations(files, trainable=HEAD), tmp_path / "one"), 3, 0.0)
    refused("--init_from=.*:7 has no checkpoint", Run, rotations(files), tmp_path / "two", f"{tmp_path}/one:7")
    parent, unet = workdirs.Parent.open(f"{tmp_path}/one"), {"unet/kernel": jax.ShapeDtypeStruct((3, 3), np.float32)}
    refused("no parameter there .* has the name and shape of one of this config", parent.matching, unet)
    changed = parent.record([]) | {"sha256": "0"}
    refused("not the checkpoint that this run began with", workdirs.Parent.recorded, changed)
    assert not (tmp_path / "two").exists()
