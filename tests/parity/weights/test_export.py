"""Exports of runs, from a checkpoint to the original libraries, of each objective."""

import dataclasses
import json

import jax
import numpy as np
import open_clip
import pytest
import small
from eval_data import patch
from helpers import close, refused
from ml_collections import ConfigDict
from specs import CLIP_FOLDER
from torch_models import equal, written_by_open_clip

import diva_jax
from diva_jax import config as configs, demo, weights
from diva_jax.data import images
from diva_jax.data.preprocess import normalise, to_float
from diva_jax.evals import Settings, encode
from diva_jax.models import backbones
from diva_jax.training import checkpoint, workdirs
from diva_jax.weights import formats, origins, parts
from diva_jax.weights.export import layouts

# Both libraries can hold it, and the objectives' autoencoders halve its sides.
_TEXT = dataclasses.replace(CLIP_FOLDER.text, vocab_size=514)
SPEC = dataclasses.replace(CLIP_FOLDER, image_size=28, patch_size=7, select="random:5", text=_TEXT)
COUNT, STEP, TOKENS = 3, 7, 17
# Objective -> whether its run keeps a moving average.
RUNS = {"diva": True, "unclip": False, "genhancer": True, "dcr": False, "kuea": True, "smartclip": True}
RUNS |= {"comclip": False, "salm": True, "judge": False}
LORA = ("genhancer", "dcr")
# The towers of the others are as DIVA's.
SAMPLE = ("diva", "genhancer", "dcr", "smartclip")


def config_of(objective: str, source: str):
    c = getattr(small, f"{objective}_config")(spec=SPEC, steps=STEP, batch_size=16, backbone__source=source)
    if objective == "smartclip":  # Its captions are longer than the source's.
        c.backbone.text.update(context_length=TOKENS, kept_positions=4)
    if objective == "salm":  # Its teacher has as many patches.
        c.teacher.image_size = 4 * c.teacher.patch_size
    c.ema.decay = 0.9 if RUNS[objective] else 0.0
    return c


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "clip"
    written_by_open_clip(folder, SPEC)
    demo.write_byte_tokenizer(folder)
    return str(folder)


def saved(c, p, workdir) -> dict[str, jax.Array]:
    """Writes a workdir with one checkpoint; returns every parameter of the towers, as the run's evaluation has them."""
    kinds = ("params", "ema") if c.ema.decay else ("params",)
    state = {k: {n: a for n, a in small.random_arrays(p, i).items() if n in p.trained} for i, k in enumerate(kinds)}
    workdirs.write_config(workdir, c)
    sha = {"source": ["x"], "sha256": formats.fingerprint(origins.open_source(c.backbone.source).tensors.files)}
    meta = {"sources": {n: sha for n, part in p.objective.pretrained().items() if part.source == c.backbone.source}}
    meta["config"] = json.loads(c.to_json())
    with checkpoint.Checkpoints(workdir) as checkpoints:
        checkpoints.save(STEP, state | {"step": jax.numpy.int32(STEP)}, {}, meta, True)
    needed = set().union(*(p.towers.needs(t) for t in p.towers.shapes)) - set(p.trained)
    return {**workdirs.initial_arrays(p, needed, every_source=False)[0], **state[kinds[-1]]}


_TRAINED = (("vision/pos_embed", 0.0), ("(vision|visual_proj)/.*", 1.0), (".*", 0.0))


@pytest.fixture(scope="module")
def run(source, tmp_path_factory):
    """(workdir of eight devices that trained the tower but its position embeddings, parameters)."""
    c = config_of("diva", source)
    c.trainable, c.mesh.fsdp, c.mesh.min_shard = _TRAINED, 8, 1
    workdir = tmp_path_factory.mktemp("run") / "work"
    return workdir, saved(c, small.program(c, 8), workdir)


def test_a_run_is_a_source_of_weights(run, source):
    """As `config.backbone.source=WORKDIR` or `WORKDIR:STEP`: what an export of the run has, with its own identity."""
    workdir, params = run
    expected = origins.open_run(workdir)
    base = formats.fingerprint(origins.open_source(source).tensors.files)
    for name in (f"{workdir}", f"{workdir}:{STEP}"):
        found = origins.open_source(name, "config.backbone.source")
        equal(found.tensors, expected.tensors)
        assert found.spec.source == name and formats.fingerprint(found.tensors.files) != base
        tower = weights.load(name, dataclasses.replace(SPEC, source=name))
        np.testing.assert_array_equal(tower.blocks[1].mlp.fc1.kernel[...], params["vision/blocks/1/mlp/fc1/kernel"])
        assert str(parts.tokenizer_folder(name)) == source
    refused(f"use one of {STEP}", origins.open_source, f"{workdir}:8")
    refused("does not exist", origins.open_source, f"{workdir}x:7")


def test_checkpoint_to_open_clip(run, source, tmp_path, capsys):
    """What was trained and what was not, bit for bit."""
    workdir, params = run
    found = origins.open_run(workdir)
    assert found.run["step"] == STEP and found.spec == dataclasses.replace(SPEC, source=source)
    layouts.export(found, found.spec, tmp_path / "out", "open_clip")
    assert "open_clip: largest difference" in capsys.readouterr().out
    original = origins.open_source(source).tensors
    written = formats.open_file(tmp_path / "out/open_clip_model.safetensors")
    untouched = [n for n in original if not n.startswith("visual.")] + ["visual.positional_embedding"]
    equal({n: written[n] for n in untouched}, {n: original[n] for n in untouched})
    trained = written["visual.transformer.resblocks.1.mlp.c_fc.weight"]
    np.testing.assert_array_equal(trained, np.asarray(params["vision/blocks/1/mlp/fc1/kernel"]).T)
    config = json.loads((tmp_path / "out/open_clip_config.json").read_text())
    assert config["model_cfg"]["quick_gelu"] is True and config["preprocess_cfg"]["resize_mode"] == "shortest"
    assert (tmp_path / "out/vocab.json").exists()
    equal(origins.open_run(workdir, STEP).tensors, origins.open_source(str(tmp_path / "out")).tensors)


def test_bad_workdirs(run, tmp_path, monkeypatch):
    workdir, _ = run
    refused("holds no run: .*--step=STEP, other weights as --source", origins.open_run, tmp_path)
    refused(r"--step=3 has no checkpoint in .*: use one of 7", origins.open_run, workdir, 3)
    refused("--weights=.*:3 has no checkpoint in .*: use one of 7", origins.find, f"{workdir}:3", "--weights")
    refused("--weights='.*/none' does not exist", origins.find, str(tmp_path / "none"), "--weights")
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    refused("has no checkpoint yet: .* or correct the path", origins.open_run, tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    other = {"visual_proj/kernel": jax.numpy.ones(3)}
    read = checkpoint.restore_params
    monkeypatch.setattr(checkpoint, "restore_params", lambda *given: (other, read(*given)[1]))
    monkeypatch.setattr(workdirs.RunAt, "towers", lambda self: {"vision": {}})
    refused("step 7, has trained no parameter of vision, only visual_proj/kernel", origins.open_run, workdir)


def test_the_config_of_another_run_or_a_source_that_changed_is_refused(run, source, monkeypatch, tmp_path):
    path = run[0] / "config.json"
    before = path.read_text()
    others = {"objective": "judge", "seed": 9, "backbone.image_size": 70, "optim.lr": 0.5}
    for name, value in (others | {"steps": 10**6, "log.every": 7}).items():
        path.write_text(small.with_fields(ConfigDict(json.loads(before)), {name: value}).to_json())
        says = f"is not the config that the checkpoint of step 7 .* differ in {name} "
        refused(says, origins.open_run, run[0]) if name in others else origins.open_run(run[0])
    path.write_text(before)
    encoder = diva_jax.load(run[0])
    monkeypatch.setattr(formats, "fingerprint", lambda files: "another")
    checked = lambda: encode.check(str(run[0]), STEP, encoder._config, texts=True)  # noqa: E731
    for use in (checked, lambda: encoder.encode_text("a"), lambda: origins.open_run(run[0])):
        refused("is not the checkpoint that the run .* began with .*put x back", use)
    monkeypatch.setattr(origins, "find", lambda *given: origins.locate("/nowhere", "x"))
    refused("that cannot be opened .* does not exist.*: run the command in", origins.open_run, run[0])


@pytest.mark.parametrize("objective", [n if n in SAMPLE else pytest.param(n, marks=pytest.mark.slow) for n in RUNS])
def test_originals_compute_what_the_evaluation_does(objective, source, tmp_path):
    c = config_of(objective, source)
    configs.validate(c, 1)
    p = small.program(c)
    params, spec = saved(c, p, tmp_path / "run"), backbones.spec_of(c)
    assert any("/lora/" in n for n in params) == any("/lora/" in n for n in p.trained) == (objective in LORA)

    # As the train loop evaluates it, and as the command does.
    towers = encode.Towers(spec, p.mesh, Settings(batch_size=COUNT))
    merged, read = p.towers(params), encode.read(str(tmp_path / "run"), STEP, c, p.mesh)
    want = towers.images(merged["vision"], patch, COUNT)["pooled"]
    close(towers.images(read.vision, patch, COUNT)["pooled"], want, 1e-6)
    # The tower as it is trained, its adapters beside their weights.
    pixels = np.stack([images.prepare(patch(i), spec.image_size, spec.resize_mode, "bicubic") for i in range(COUNT)])
    view = normalise(to_float(pixels), spec.mean, spec.std)
    rest = {n: np.zeros(a.shape, a.dtype) for n, a in p.arrays.items() if n not in params}
    close(want, jax.jit(lambda a, x: p.skeleton.merge(a).vision.encode(x).pooled)({**rest, **params}, view), 2e-5)
    found = origins.open_run(tmp_path / "run")
    assert ("text" in merged) == (objective == "smartclip") and found.run["tuned"] == sorted(merged)
    # Texts of several lengths, if it has a text tower; the highest id is that of the end.
    ids = np.random.default_rng(3).integers(3, SPEC.text.vocab_size - 1, (COUNT, TOKENS)).astype(np.int32)
    for row, length in zip(ids, (5, TOKENS, 11), strict=True):
        row[length - 1], row[length:] = SPEC.text.vocab_size - 1, 0
    if "text" in merged:
        close(towers.texts(read.text, ids), texts := towers.texts(merged["text"], ids), 1e-6)
    given = ids if "text" in merged else None
    for fmt in ("open_clip", "hf"):
        layouts.export(found, found.spec, out := tmp_path / fmt, fmt)
        if fmt == "hf":
            theirs, _ = layouts.transformers_embeddings(out, np.array(view), given, TOKENS)
        else:
            theirs = layouts.open_clip_embeddings(out, np.array(view), given)
        close(theirs[0], want, 2e-5)
        if "text" in merged:
            close(theirs[2], texts, 2e-5)
    prepare = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'open_clip'}")[2]
    prepared = np.stack([prepare(patch(i)).numpy() for i in range(COUNT)])
    np.testing.assert_allclose(prepared.transpose(0, 2, 3, 1), view, atol=1e-6)
