"""Objectives outside of the package, selected by dotted path, from config to open_clip."""

import csv
import importlib
import json
import shutil
import signal
import sys
import time

import commands
import jax
import numpy as np
import open_clip
import pytest
import small
import torch
from e2e_config import get_config
from flax import nnx
from helpers import close
from places import SUPPORT
from specs import TEACHER

from diva_jax import demo
from diva_jax.data.photos import write_folder
from diva_jax.evals import encode
from diva_jax.models import backbones
from diva_jax.models.layers import Keys
from diva_jax.training import checkpoint, partition, workdirs
from diva_jax.weights import clip, names, origins, readers, writers

NAMES = ("distillation", "captions")
TOTAL = {"distillation": 220, "captions": 6}
BOUNDARY = 20  # Of the stages of a distillation.
SLOW_CAPTIONS = pytest.param("captions", marks=pytest.mark.slow)  # The adapters of a distillation have dropout.


@pytest.fixture(scope="module")
def world(files, tmp_path_factory):
    """Files of both objectives: photographs with captions, the model to tune, its tokenizer, a teacher, and classes."""
    root = tmp_path_factory.mktemp("world")
    shutil.copytree(SUPPORT / "outside", root / "elsewhere")
    shutil.copytree(files / "photos", root / "photos")
    shutil.copytree(files / "clip", root / "clip")
    demo.write_byte_tokenizer(root / "clip")
    teacher = backbones.build(TEACHER, rngs=Keys(7))
    tensors = names.to_torch(nnx.state(teacher), clip.vision_table(TEACHER))
    writers.write_safetensors(root / "teacher.safetensors", tensors)
    write_folder(root / "classes", count=24)
    (root / "classes" / "zeroshot_classification_templates.txt").write_text("a photo of a {c}\n")
    sys.path.insert(0, str(root))
    for name in NAMES:
        importlib.import_module(f"elsewhere.{name}")  # A workdir may name modules that are imported already.
    yield root
    sys.path.remove(str(root))


def train(world, name, workdir, *more):
    flags = (f"--config={SUPPORT}/e2e_config.py:elsewhere.{name}:{world}", f"--workdir={workdir}", *more)
    return commands.start("main", *flags, path=(world,))


@pytest.fixture(scope="module", params=NAMES)
def ran(request, world, tmp_path_factory):
    """(objective, workdir, output) of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("runs") / request.param
    code, out, err = commands.finish(train(world, request.param, workdir))
    assert code == 0, err
    return request.param, workdir, out


def test_a_run_trains_its_stages_and_says_what_accumulation_does(ran):
    name, workdir, out = ran
    if name == "distillation":
        assert "stage head: steps 0 to 20" in out and "stage tune: steps 20 to 220" in out
        assert "compares" not in out
    else:
        assert "compares the images of a micro-batch with each other: 4 at once, not the 8 of a step" in out
    assert (workdir / "done").exists() and checkpoint.latest_step(workdir) == TOTAL[name]


def test_adapters_and_head_alone_are_in_the_checkpoint(ran):
    name, workdir, _ = ran
    trained = set(workdirs.RunAt.open(workdir).params)
    if name == "captions":
        assert "logit_scale" in trained and {n.split("/")[0] for n in trained} == {"vision", "text", "logit_scale"}
        return
    leaves = {n.rsplit("/", 1)[1] for n in trained if n.startswith("vision/")}
    assert leaves == {"a", "b", "bias"} and {n for n in trained if not n.startswith("vision/")} == {
        "head/kernel",
        "head/bias",
    }


@pytest.mark.parametrize("ran", ["distillation", SLOW_CAPTIONS], indirect=True)
def test_a_killed_run_resumes_bit_identical(ran, world, tmp_path):
    """Killed as soon as the checkpoint between the stages is there; the adapters have dropout."""
    name, whole, _ = ran
    process = train(world, name, tmp_path / "run")
    commands.wait_for_step(process, BOUNDARY)
    until = time.monotonic() + 60  # The step's checkpoint is written in the background.
    while not checkpoint.latest_step(tmp_path / "run") and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    assert commands.finish(process)[0] == -signal.SIGKILL
    saved = checkpoint.latest_step(tmp_path / "run")
    assert BOUNDARY <= saved < TOTAL[name]
    assert f"resumed from the checkpoint of step {saved}" in commands.output(train(world, name, tmp_path / "run"))
    program, states = small.program(get_config(f"elsewhere.{name}:{world}")), []
    for workdir in (tmp_path / "run", whole):
        with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
            state, data, _ = checkpoints.restore(TOTAL[name], program.abstract_state(len(program.stages) - 1))
        assert data["batches"] == TOTAL[name]
        states.append(state)
    jax.tree.map(np.testing.assert_array_equal, *states)


def predictions(out) -> list[dict]:
    with open(out / "predictions.csv", newline="") as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize("ran", ["distillation", SLOW_CAPTIONS], indirect=True)
def test_evaluation_and_export_use_what_was_trained(ran, world, tmp_path):
    name, workdir, _ = ran
    out, tuned = tmp_path / "scores", tmp_path / "tuned"
    export = ("export_torch", f"--workdir={workdir}", f"--out={tuned}")
    assert "--trust_objective" in commands.refused(*export, path=(world,))
    commands.succeed(*export, "--trust_objective", path=(world,))
    configuration = f"--config={SUPPORT}/e2e_config.py:elsewhere.{name}:{world}"
    weights = [f"--weights={w}" for w in (world / "clip", workdir, tuned)]
    data = ("--task=zeroshot", f"--data={world}/classes", "--config.eval.bootstrap=50", f"--out={out}")
    commands.succeed("evaluate", configuration, *weights, *data, path=(world,))

    rows = {label: [] for label in json.loads((out / "results.json").read_text())["tasks"]["zeroshot"]["weights"]}
    for row in predictions(out):
        rows[row.pop("weights")].append(row)
    base, run, exported = rows.values()
    assert run == exported  # Every score of every image, to the last digit.
    assert [r["score"] for r in run] != [r["score"] for r in base]

    c = get_config(f"elsewhere.{name}:{world}")
    found = encode.read(str(workdir), TOTAL[name], c, partition.make_mesh(c.mesh))
    scored = {"vision": found.vision} | ({"text": found.text} if found.text is not None else {})
    written = readers.open_file(tuned / "open_clip_model.safetensors")
    original = readers.open_file(world / "clip" / "open_clip_model.safetensors")
    spec = backbones.spec_of(c)
    tensors = origins.in_open_clip_names(scored, spec)
    for tensor, array in tensors.items():
        np.testing.assert_array_equal(np.asarray(written[tensor]), array, err_msg=tensor)
    changed = {n for n in original if not np.array_equal(np.asarray(written[n]), np.asarray(original[n]))}
    if name == "distillation":  # Only adapted layers.
        assert changed and all(".resblocks." in n and "ln_" not in n for n in changed)
        assert {n.rsplit(".", 1)[1] for n in changed} == {"weight", "bias", "in_proj_weight", "in_proj_bias"}
    else:
        assert {"logit_scale", "text_projection", "visual.proj", "token_embedding.weight"} <= changed

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tuned}")
    pictures = np.random.default_rng(3).standard_normal((2, 3, spec.image_size, spec.image_size)).astype(np.float32)
    with torch.no_grad():
        theirs = model.eval().encode_image(torch.from_numpy(pictures)).numpy()
    skeleton, _ = partition.disassemble(backbones.build(spec, rngs=Keys(0)))
    ours = skeleton.merge(found.vision).encode(pictures.transpose(0, 2, 3, 1)).pooled
    close(ours, theirs, 2e-5)


def test_losses_do_not_depend_on_devices(world):
    """The negatives of `captions` are those of the whole micro-batch, for any number of devices."""
    c = get_config(f"elsewhere.captions:{world}")
    c.batch_size = 16
    alone, shared = (small.train(c, 4, devices).metrics["loss"] for devices in (1, 8))
    np.testing.assert_allclose(shared, alone, rtol=1e-5)
