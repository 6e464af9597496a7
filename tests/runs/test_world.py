"""The world at tiny size: pretraining that resumes, gaps, an experiment that goes on where it stopped, images."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from diva_jax.data import tokenizers
from diva_jax.training import load, sharding
from diva_jax.training.step import Program
from diva_jax.weights import loading
from diva_jax.world import (
    arms,
    blindness,
    comparison,
    denoised,
    drawing,
    experiment,
    gaps,
    models,
    noise,
    objectives,
    pretrain,
    scenes,
    tuning,
)

SMALL = dict(
    block_out_channels=[8, 8],
    attention_head_dim=[2, 2],
    norm_num_groups=2,
    cross_attention_dim=24,
)
TEXT = dict(hidden_size=24, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder of a whole pretraining with tiny models, which stand for the kept ones."""
    out = tmp_path_factory.mktemp("world")
    patch = pytest.MonkeyPatch()
    text = dataclasses.replace(models.SPEC.text, width=24, heads=2, layers=1, mlp_dim=24)
    source = str(out / "weights" / models.CLIP)
    tiny = dict(width=24, heads=2, layers=1, mlp_dim=24, embed_dim=12, patch_size=8, text=text, source=source)
    patch.setattr(models, "SPEC", dataclasses.replace(models.SPEC, **tiny))
    diffusion = models.DIFFUSION | dict(
        unet=models.DIFFUSION["unet"] | SMALL, text_encoder=models.DIFFUSION["text_encoder"] | TEXT
    )
    patch.setattr(models, "DIFFUSION", diffusion)
    by_class = dict(class_embed_type="projection", projection_class_embeddings_input_dim=24)
    patch.setattr(
        models,
        "UNCLIP_DIFFUSION",
        diffusion | dict(unet=diffusion["unet"] | by_class, scheduler=models.UNCLIP_DIFFUSION["scheduler"]),
    )
    patch.setattr(models, "WEIGHTS", out / "weights")
    patch.setattr(blindness, "_ITERATIONS", 2)
    for name, value in (("_PROBE_TRAIN", 200), ("_PROBE_TEST", 60), ("_NAMED", 20), ("_BATCH", 64)):
        patch.setattr(blindness, name, value)
    assert pretrain.pretrain(out, 0.0, 8, print)
    yield out
    patch.undo()


def test_pretraining_writes_folders_that_every_reader_opens_and_is_done_once(world, capfd):
    for name in (models.CLIP, models.TEACHER, models.GENERATOR, models.UNCLIP, models.PROJECTION):
        assert (world / "weights" / name).is_dir()
    loading.load(models.SPEC.source, models.SPEC)
    tokenizers.open_tokenizer(models.SPEC.text, models.SPEC.source)
    before = (world / "weights" / models.CLIP / "open_clip_model.safetensors").stat().st_mtime_ns
    assert pretrain.pretrain(world, 0.0, 8, print)
    assert (world / "weights" / models.CLIP / "open_clip_model.safetensors").stat().st_mtime_ns == before
    assert "compiling" not in capfd.readouterr().out


def test_gaps_of_a_generator_that_knows_nothing(world):
    generator = gaps.Generator(models.base_config(objectives.LATENT).diffusion.source)
    rows, facts = gaps.by_timestep(generator, 8), gaps.by_fact(generator, 4)
    assert len(rows) == gaps.BINS and rows[-1]["high"] == 1000 and set(facts) == set(blindness.scenes.FACTS)
    assert "relation" in gaps.table(rows, facts)


def test_an_experiment_goes_on_where_it_stopped(world, tmp_path):
    budget = {"steps": 3, "batch_size": 4, "pairs": 2}
    first = experiment.experiment(tmp_path, ["stages"], 1, budget)
    assert [(r["arm"], r["seed"]) for r in first] == [("untuned", 0), ("stages", 0)]
    path = tmp_path / experiment.RESULTS
    path.write_text(path.read_text() + '{"arm": "sta')  # Killed while it wrote.
    both = experiment.experiment(tmp_path, ["stages"], 2, budget)
    assert both[:2] == first and [(r["arm"], r["seed"]) for r in both[1:]] == [("stages", 0), ("stages", 1)]
    assert both[1]["loss"] != both[2]["loss"]
    assert [json.loads(line) for line in path.read_text().splitlines()] == both
    assert both[1]["drift"] > 0 == both[0]["drift"]
    assert "nothing can be claimed" in comparison.markdown(comparison.compare(both))


def test_estimates_are_the_images_themselves_where_there_is_no_noise(world):
    """At timestep 0 almost nothing is noise, so that the estimate is what the patch code keeps of the image."""
    c = arms.arm_config(arms.ARMS["diva"], seed=0, steps=3, batch_size=4, random="")
    p = Program(c, sharding.make_mesh(c.mesh, jax.devices()[:1]))
    params, _ = load.initial_arrays(p, every_source=False)
    images = drawing.draw(scenes.sample(np.random.default_rng(1), 3))
    early, late = (denoised.estimates(p, [params], images, t)[0].astype(float) for t in (0, 900))
    assert np.abs(early - images).mean() < 20 < np.abs(late - images).mean()


@pytest.mark.parametrize("name", ["unclip", "genhancer_random", pytest.param("rich_clip", marks=pytest.mark.slow)])
def test_arms_of_other_objectives_move_the_encoder(world, tmp_path, monkeypatch, name):
    tuner = tuning.Tuner(arms.ARMS[name], 3, 20, tmp_path)
    towers, loss = tuner.run(0)
    before = tuner.program.towers(load.initial_arrays(tuner.program, every_source=False)[0])
    assert np.isfinite(loss)
    assert any(not np.array_equal(a, before["vision"][n]) for n, a in towers["vision"].items())
    if name == "unclip":
        for size in ("GROUPS", "IMAGES", "DRAWS"):
            monkeypatch.setattr(noise, size, 2)
        found = noise.gradients(tuner)
        assert found.shape[:2] == (2, 2) and np.isfinite(found).all()
        assert len({g.tobytes() for g in found.reshape(4, -1)}) == 4, "the same gradient twice"
    if arms.ARMS[name].shared_first_stage:
        again, other = tuner.run(1), tuner.run(0)
        tuner._first = None  # As in a process that begins with seed 1.
        alone = tuner.run(1)
        assert again[1] == alone[1] != other[1] == loss
        assert all(np.array_equal(a, alone[0]["vision"][n]) for n, a in again[0]["vision"].items())
