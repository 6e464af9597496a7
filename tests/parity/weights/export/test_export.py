"""Exports of a run, from a checkpoint to open_clip; the journeys have the command."""

import dataclasses
import functools
import json
import sys

import commands
import jax
import numpy as np
import pytest
from exports import equal
from helpers import refused
from ml_collections import ConfigDict

from diva_jax import config as configs
from diva_jax import demo, weights
from diva_jax.common.errors import UserError
from diva_jax.models import backbones, layers
from diva_jax.models.backbones import TINY
from diva_jax.training import checkpoint, partition, workdirs
from diva_jax.training.sharding import make_mesh, parameter_shardings
from diva_jax.weights import names, origins, parts, readers, runs
from diva_jax.weights.export import layouts


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir whose one checkpoint trained the blocks and the projection, but not the position embeddings."""
    root = tmp_path_factory.mktemp("run")
    demo.write_clip(root / "clip", TINY)
    demo.write_byte_tokenizer(root / "clip")
    c = configs.default(TINY, "tiny")
    c.backbone.source, c.data.path, c.data.image_size = str(root / "clip"), "somewhere/photos", 64
    workdir = root / "work"
    workdirs.write_config(workdir, c)
    rng = np.random.default_rng(0)
    tower = names.flat(layers.abstract(lambda rngs: backbones.build(TINY, rngs=rngs)))
    shapes = {"vision/" + partition.name_of(p): v.shape for p, v in tower.items() if p != ("pos_embed",)}
    params = {n: rng.standard_normal(s, np.float32) * 0.05 for n, s in shapes.items()}
    # Sharded over all eight devices, as in a run on a mesh.
    mesh = make_mesh(ConfigDict(dict(data=1, fsdp=8)))
    shardings = parameter_shardings(params, mesh, 1)
    placed = {n: jax.device_put(a, shardings[n]) for n, a in params.items()}
    source = origins.open_source(str(root / "clip"))
    meta = {
        "config": json.loads(c.to_json()),
        "sources": {"vision": {"source": ["x"], "sha256": readers.fingerprint(source.files)}},
    }
    checkpoints = checkpoint.Checkpoints(workdir)
    checkpoints.save(7, {"params": placed, "opt": {"mu": placed}, "step": jax.numpy.int32(7)}, {}, meta)
    checkpoints.close()
    return root, params


def test_a_run_is_a_source_of_weights(run):
    """As `config.backbone.source=WORKDIR` or `WORKDIR:STEP`: what an export of the run has, with its own identity."""
    root, params = run
    expected = runs.open_run(root / "work")
    base = readers.fingerprint(origins.open_source(str(root / "clip")).files)
    for source in (f"{root}/work", f"{root}/work:7"):
        found = origins.open_source(source, "config.backbone.source")
        equal(found.tensors, expected.tensors)
        assert found.spec.source == source and readers.fingerprint(found.files) != base
        tower = weights.load(source, dataclasses.replace(TINY, source=source))
        kernel = params["vision/blocks/1/mlp/fc1/kernel"]
        np.testing.assert_array_equal(tower.blocks[1].mlp.fc1.kernel[...], kernel)
        assert parts.tokenizer_folder(source) == root / "clip"
    refused("use one of 7", origins.open_source, f"{root}/work:8")
    refused("does not exist", origins.open_source, f"{root}/nothing:7")


def test_checkpoint_to_open_clip(run, tmp_path, capsys):
    root, params = run
    source = runs.open_run(root / "work")
    assert source.run["step"] == 7 and source.spec == dataclasses.replace(TINY, source=str(root / "clip"))
    layouts.export(source, source.spec, tmp_path / "out", "open_clip")
    assert "open_clip: largest difference" in capsys.readouterr().out

    original = origins.open_source(str(root / "clip")).tensors
    written = readers.open_file(tmp_path / "out/open_clip_model.safetensors")
    untouched = [n for n in original if not n.startswith("visual.")] + ["visual.positional_embedding"]
    equal({n: written[n] for n in untouched}, {n: original[n] for n in untouched})
    np.testing.assert_array_equal(
        written["visual.transformer.resblocks.1.mlp.c_fc.weight"], params["vision/blocks/1/mlp/fc1/kernel"].T
    )
    config = json.loads((tmp_path / "out/open_clip_config.json").read_text())
    assert config["model_cfg"]["quick_gelu"] is True and config["preprocess_cfg"]["resize_mode"] == "shortest"
    assert (tmp_path / "out/vocab.json").exists()

    again = runs.open_run(root / "work", 7)
    equal(again.tensors, origins.open_source(str(tmp_path / "out")).tensors)


def test_bad_workdirs(run, tmp_path):
    root, _ = run
    refused("holds no run", runs.open_run, tmp_path)
    refused(r"--step=3 has no checkpoint in .*: use one of 7", runs.open_run, root / "work", 3)
    (tmp_path / "config.json").write_text((root / "work/config.json").read_text())
    refused("has no checkpoint yet", runs.open_run, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [
        ("objective", "clip", True),
        ("seed", 9, True),
        ("backbone.image_size", 70, True),
        ("optim.lr", 0.5, True),
        ("steps", 10**6, False),
        ("log.every", 7, False),
    ],
)
def test_the_config_of_another_run_is_refused(run, name, value, refused):
    root, _ = run
    path = root / "work/config.json"
    before, config = path.read_text(), json.loads(path.read_text())
    *sections, field = name.split(".")
    functools.reduce(dict.__getitem__, sections, config)[field] = value
    path.write_text(json.dumps(config))
    try:
        if refused:
            with pytest.raises(
                UserError, match=f"is not the config that the checkpoint of step 7 .* differ in {name} "
            ):
                runs.open_run(root / "work")
        else:
            runs.open_run(root / "work")
    finally:
        path.write_text(before)


def test_a_checkpoint_that_trained_no_tower_is_refused(run, monkeypatch):
    root, _ = run
    other = {"visual_proj/kernel": jax.numpy.ones(3)}
    monkeypatch.setattr(workdirs.RunAt, "params", property(lambda self: other))
    monkeypatch.setattr(workdirs.RunAt, "towers", lambda self: {"vision": {}})
    refused("step 7, has trained no parameter of vision, only visual_proj/kernel", runs.open_run, root / "work")


def test_a_source_that_changed_is_refused(run, tmp_path):
    root, _ = run
    file = root / "clip/open_clip_model.safetensors"
    before = file.read_bytes()
    demo.write_clip(root / "clip", TINY, seed=5)
    try:
        refused("is not the checkpoint that the run began with", runs.open_run, root / "work")
    finally:
        file.write_bytes(before)


@pytest.mark.slow
def test_round_trip_of_vit_b_32_at_full_size(tmp_path):
    """open_clip's own file, converted through our modules to both formats, is bit-identical."""
    flags = ("--config=configs/custom.py:ViT-B-32", "--norun", f"--tmp={tmp_path}")
    printed = commands.output(commands.launch(sys.executable, "bench/roundtrip.py", *flags))
    for fmt in ("open_clip", "hf"):
        assert f"{fmt}: all 302 tensors are bit-identical to those of the original file" in printed, printed
