"""The world at tiny size: pretraining that is done once, knowledge, criteria, an experiment that goes on, reasons."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import small

import diva_jax.world.tuning as tuning
import diva_jax.world.why as why
from diva_jax.data import tokenizers
from diva_jax.training import workdirs
from diva_jax.weights import parts
from diva_jax.world import arms, blindness, comparison, criteria, experiment, knowledge, models, pretrain, scenes

SMALL = dict(block_out_channels=[8], attention_head_dim=[2], norm_num_groups=2, cross_attention_dim=24)
TEXT = dict(hidden_size=24, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
BUDGET = arms.Budget(24, 8, 8)


@pytest.fixture(scope="module")
def world(home):
    """The folder of a whole pretraining with tiny models, which stand for the kept ones."""
    patch = pytest.MonkeyPatch()
    text = dataclasses.replace(models.SPEC.text, width=24, heads=2, layers=1, mlp_dim=24)
    source = str(home / "weights" / models.CLIP)
    tiny = dict(width=24, heads=2, layers=1, mlp_dim=24, embed_dim=12, patch_size=8, text=text, source=source)
    patch.setattr(models, "SPEC", dataclasses.replace(models.SPEC, **tiny))
    unet, words = models.DIFFUSION["unet"] | SMALL, models.DIFFUSION["text_encoder"] | TEXT
    by_class = unet | dict(class_embed_type="projection", projection_class_embeddings_input_dim=24)
    patch.setattr(models, "DIFFUSION", models.DIFFUSION | dict(unet=unet, text_encoder=words))
    patch.setattr(models, "UNCLIP_DIFFUSION", models.DIFFUSION | dict(unet=by_class))
    patch.setattr(models, "WEIGHTS", home / "weights")
    sizes = {blindness: {"_ITERATIONS": 2, "_PROBE_TRAIN": 60, "_PROBE_TEST": 40, "_BATCH": 64}}
    sizes |= {knowledge: {"_BATCH": 8}, why: {"GROUPS": 4, "IMAGES": 4, "COUNT": 4}}
    for module, values in sizes.items():
        for name, value in values.items():
            patch.setattr(module, name, value)
    # One stage of each kind; the others are stood for by weights that were not trained.
    kept = (models.CLIP, models.GENERATOR, models.PROJECTION)
    patch.setattr(pretrain, "STAGES", {n: pretrain.STAGES[n] for n in kept})
    models.write_new_diffusion(home / "weights" / models.UNCLIP, models.UNCLIP_DIFFUSION)
    models.write_new_clip(home / "weights" / models.TEACHER)
    pretrain.pretrain(home, 0.0)
    yield home
    patch.undo()


def test_pretraining_writes_folders_that_every_reader_opens_and_is_done_once(world, capfd):
    assert all((world / "weights" / name).is_dir() for name in pretrain.STAGES)
    parts.load(models.SPEC.source, models.SPEC)
    tokenizers.open_tokenizer(models.SPEC.text, models.SPEC.source)
    before = {p: p.stat().st_mtime_ns for p in (world / "weights").rglob("*")}
    pretrain.pretrain(world, 0.0)
    assert {p: p.stat().st_mtime_ns for p in (world / "weights").rglob("*")} == before
    assert "compiling" not in capfd.readouterr().out


def test_what_was_trained_is_what_was_written(world):
    """After two steps the tower is near the one that it started from, and not equal to it."""
    start, end = (parts.load(str(world / f / models.CLIP), models.SPEC) for f in ("start", "weights"))
    for a, b in zip(*(jax.tree.leaves(jax.tree.map(np.asarray, m)) for m in (start, end)), strict=True):
        assert np.abs(a - b).max() < 0.02
    pooled = [m.encode(np.ones((1, 16, 16, 3), np.float32)).pooled for m in (start, end)]
    assert (np.asarray(pooled[0]) != np.asarray(pooled[1])).any()


def test_models_that_know_nothing_fail_the_criteria(world):
    found = list(criteria.of_models(world / "weights", blindness.Tests.make(1, 4)))
    assert len(found) == 2 + 2 * len(scenes.FACTS) and not all(c.holds for c in found)
    nats = knowledge.Generator().nats("relation", 5)
    assert nats.shape == (5,) and np.isfinite(nats).all()


def test_an_experiment_goes_on_where_it_stopped(world, tmp_path):
    def told(rows):
        return [(r["arm"], r["seed"], r["after"]) for r in rows]

    first = experiment.experiment(tmp_path, ["judge"], [0], BUDGET, 2)
    assert told(first) == [("untuned", 0, 0), ("judge", 0, 8), ("judge", 0, 24)]
    path = tmp_path / experiment.RESULTS
    cut = dict(first[1], seed=1)  # Killed in the second run, while it wrote.
    path.write_text(path.read_text() + json.dumps(cut) + '\n{"arm": "jud')
    both = experiment.experiment(tmp_path, ["judge"], [0, 1], BUDGET, 2)
    assert both[:3] == first and told(both[3:]) == [("judge", 1, 8), ("judge", 1, 24)]
    assert len({r["loss"] for r in both[1:]}) == 4
    assert [json.loads(line) for line in path.read_text().splitlines()] == both
    assert "its control was not run" in comparison.markdown(comparison.compare(both))
    assert comparison.compare(both, early=True)["judge"].seeds == 2


@pytest.mark.parametrize("name", [n for n in arms.ARMS if not n.endswith("_control") and n != "untuned"])
def test_every_arm_can_be_built_and_tunes_the_vision_tower_last(world, tmp_path, name):
    program = tuning.Tuner(arms.find(name), BUDGET, tmp_path).program
    assert any(n.startswith("vision/") for n in program.active(len(program.stages) - 1))


def test_images_of_an_earlier_stage_are_not_counted(world, tmp_path):
    arm = arms.find("genhancer")
    arm = dataclasses.replace(arm, fields=arm.fields | {"genhancer.stage1_steps": 2})
    assert [after for after, _, _ in tuning.Tuner(arm, BUDGET, tmp_path).run(0)] == [8, 24]


SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in ("kuea_control", "salm_control", "dcr_control")]


@pytest.mark.parametrize("name", ["unclip", *SLOW])
def test_arms_move_the_encoder_and_say_why(world, tmp_path, name):
    tuner = tuning.Tuner(arms.find(name), BUDGET, tmp_path)
    towers, loss = list(tuner.run(0))[-1][1:]
    before = tuner.program.towers(workdirs.initial_arrays(tuner.program, every_source=False)[0])
    assert np.isfinite(loss)
    assert any(not np.array_equal(a, before["vision"][n]) for n, a in towers["vision"].items())
    found = why.measure(name, tmp_path, blindness.Encoder())
    assert set(found["cosine"]) == set(scenes.FACTS) and found["noise_scale"] > 0
    assert ("nats" in found) == (name == "unclip") and "relation" in why.table({name: found})


def test_batches_are_those_of_the_records(world):
    c = arms.arm_config(arms.find("judge"), 3, BUDGET)
    p = small.program(c)
    found, again = (list(tuning.batches(c, p.objective.inputs, 3, 2)) for _ in range(2))
    shapes = [{n: (a.shape, a.dtype) for n, a in batch.items()} for batch in (found[0], p.abstract_batch())]
    assert shapes[0] == shapes[1]
    jax.tree.map(np.testing.assert_array_equal, found, again)
    assert not np.array_equal(found[0]["image"], found[1]["image"])
