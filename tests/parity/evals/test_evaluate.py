"""Evaluations, checkpoints of runs as weights, the results file, and parameters in training."""

import csv
import json

import commands
import numpy as np
import pytest
import small
from eval_data import eval_config, patch, statement, write_class_folders, write_mmvp
from eval_models import centred, torch_model, write_model
from helpers import refused, tensors
from specs import EVAL_CLIP as CLIP

from diva_jax.common.errors import UserError
from diva_jax.evals import encode, evaluator
from diva_jax.report import evaluation, inputs, page
from diva_jax.training import checkpoint, partition, workdirs
from diva_jax.weights import origins, readers
from diva_jax.weights.writers import write_safetensors

CONFIG = """
import dataclasses
import json
from pathlib import Path
from diva_jax import config
from diva_jax.models.backbones import Spec, TextSpec

def get_config():
    fields = json.loads(Path({path!r}).read_text())
    text = TextSpec(**fields.pop("text"))
    return config.default(Spec(**fields, text=text))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    images = write_class_folders(root / "images", [i % 3 for i in range(12)], ["cup", "logo", "rocket"])
    return {"mmvp": str(write_mmvp(root / "mmvp")), "drift": str(images)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    texts = [f"a photo of {statement(i)}" for i in range(0, 270, 9)]
    model = centred(torch_model(CLIP), CLIP, [patch(i) for i in range(0, 270, 9)], texts)
    return write_model(tmp_path_factory.mktemp("weights") / "base", model)


@pytest.fixture
def config(base):
    """With few resamples and draws."""
    c = eval_config(CLIP, base)
    c.eval.update(bootstrap=300, batch_size=32)
    c.eval.mmvp.seeds, c.eval.drift.neighbours = 2, 3
    return c


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, base):
    """A run that trains only the last block, with checkpoints of steps 2 and 5."""
    return trained_run(tmp_path_factory.mktemp("runs") / "tuned", base, seed=0)


def trained_run(folder, base, seed: int):
    c = small.small_config(trainable=(("vision/blocks/1/.*", 1.0), ("visual_proj/.*", 1.0), (".*", 0.0)), seed=seed)
    c.backbone = eval_config(CLIP, base).backbone
    workdirs.write_config(folder, c)
    program = small.program(c)
    checkpoints = checkpoint.Checkpoints(folder)
    for step in (2, 5):
        arrays = small.random_arrays(program, seed=step + 10 * seed)
        began = {"source": ["x"], "sha256": readers.fingerprint(origins.open_source(str(base)).files)}
        meta = {"sources": {"vision": began}, "config": json.loads(c.to_json())}
        checkpoints.save(step, program.init_state(arrays), {}, meta)
    checkpoints.close()
    return folder


def test_a_checkpoint_is_what_was_saved(config, workdir, base):
    """The trained block is that of the checkpoint, the rest that of the source."""
    mesh = partition.make_mesh(config.mesh)
    path, step, _ = origins.find(str(workdir), "--weights")
    assert step == 5 and origins.find(f"{workdir}:2", "--weights")[:2] == (str(workdir), 2)
    found = encode.read(path, step, config, mesh)
    source = encode.read(str(base), None, config, mesh)
    program = small.program(workdirs.read_config(workdir))
    saved = small.random_arrays(program, seed=5)
    assert set(found.params) == set(program.trained) and {"visual_proj/kernel", "visual_proj/bias"} < set(found.params)
    for name, array in found.params.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(saved[name]), err_msg=name)
    assert set(found.vision) == set(source.vision)
    for name, array in found.vision.items():
        ours = f"vision/{name}"
        want = saved[ours] if ours in program.trained else source.vision[name]
        np.testing.assert_array_equal(np.asarray(array), np.asarray(want), err_msg=name)
    assert found.source == str(base) and found.text is None


def test_a_vision_tower_alone_has_the_configs_text_tower(config, base, tmp_path):
    """DIVA's authors publish their encoders in this form."""
    tower = tensors(torch_model(CLIP, seed=8).visual)
    write_safetensors(tmp_path / "tuned.safetensors", tower)
    found = encode.read(str(tmp_path / "tuned.safetensors"), None, config, partition.make_mesh(config.mesh))
    assert found.source == str(base) and found.text is None
    np.testing.assert_array_equal(found.vision["class_embed"], tower["class_embedding"])


def flags(tmp_path, config, *args) -> list:
    """The arguments of `evaluate`, with a config file of this backbone."""
    fields = tmp_path / "spec.json"
    fields.write_text(json.dumps(config.backbone.to_dict()))
    (tmp_path / "config.py").write_text(CONFIG.format(path=str(fields)))
    return [f"--config={tmp_path / 'config.py'}", *args]


def test_runs_of_other_seeds_and_several_checkpoints(tmp_path, config, data, base, workdir):
    others = [trained_run(tmp_path / f"s{seed}", base, seed) for seed in (1, 2, 3)]
    group = "tuned=" + ",".join(f"{other}:5" for other in others)
    args = [f"--weights={w}" for w in (base, group, f"{workdir}:2", f"{workdir}:5")] + ["--control=tuned", "--best"]
    args += ["--task=mmvp,drift", f"--data=mmvp={data['mmvp']}", f"--data=drift={data['drift']}"]
    args += [f"--config.eval.{o}" for o in ("bootstrap=300", "mmvp.seeds=2", "batch_size=50", "drift.neighbours=3")]
    code, printed, err = commands.run("evaluate", *flags(tmp_path, config, *args, f"--out={tmp_path / 'out'}"))
    assert code == 0, err
    assert f"{workdir}: the best of 2 checkpoints in MMVP-VLM, " in printed and "over 3 runs [" in printed
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["weights"][1] == {
        "label": "tuned",
        "members": [{"source": str(other), "step": 5} for other in others],
    }
    assert list(found["tasks"]["mmvp"]["weights"]) == ["base", "tuned", "tuned:2", "tuned:5"]
    for task, metric, kind in (("mmvp", "pooled_match", "difference"), ("drift", "cosine", "score")):
        compared = {(c["before"], c["after"]): c["scores"] for c in found["tasks"][task]["comparisons"]}
        own = compared["base", "tuned"][metric]
        assert len(own["runs"]) == 3 and own[kind] == pytest.approx(np.mean(own["runs"]))
        assert own["runs_interval"][0] < own[kind] < own["runs_interval"][1]
        assert len(compared["tuned", "tuned:5"][metric]["runs"]) == 3
    (said,) = [s for s in found["summary"] if (s["before"], s["after"]) == ("base", "tuned")]
    assert "over 3 runs [" in said["detail"]
    with open(tmp_path / "out" / "predictions.csv") as f:
        assert {"s1:5", "s2:5", "s3:5", "tuned:2"} < {row["weights"] for row in csv.DictReader(f)}
    read = inputs.read(tmp_path / "out")
    assert any("Several checkpoints" in str(alarm.title) for alarm in evaluation.alarms(read))
    assert page.sections(read)[0].title == "MMVP-VLM"
    wrong = [a for a in args if not a.startswith("--weights")] + [
        f"--weights={base}",
        f"--weights=tuned={workdir}:2,{others[0]}",
    ]
    code, _, err = commands.run("evaluate", *flags(tmp_path, config, *wrong, f"--out={tmp_path / 'wrong'}"))
    assert code == 2 and "are not at one step: name it, WORKDIR:STEP" in err


def test_the_tokenizer_may_come_from_elsewhere(tmp_path, config, data, base):
    (tmp_path / "open_clip_model.safetensors").hardlink_to(base / "open_clip_model.safetensors")
    mesh = partition.make_mesh(config.mesh)
    bare = encode.Encoder({}, None, str(tmp_path), {}, str(tmp_path))
    runner = evaluator.Evaluator(config, mesh, {"mmvp": data["mmvp"]})
    refused("has no tokenizer: it needs tokenizer.json", runner.model, "bare", bare)
    config.eval.tokenizer = str(base)
    runner = evaluator.Evaluator(config, mesh, {"mmvp": data["mmvp"]})
    assert runner.model("bare", bare).embeddings.shape == (270, CLIP.embed_dim)


def test_data_that_does_not_fit_the_tasks():
    for tasks, given, says in (
        ([], ["x"], "--task is missing"),
        (["mmvp", "drift"], ["mmvp=x"], "the task drift has no data"),
        (["mmvp", "drift"], ["mmvp=x", "y"], "--data=y belongs to no task"),
        (["mmvp", "drift"], ["mmvp=x", "drift=y", "zeroshot=z"], "--data=zeroshot=z belongs to no task"),
        (["mmvp"], ["mmvp="], "the task mmvp has no data"),
    ):
        refused(says, evaluator.data_of, tasks, given)


def test_data_and_labels():
    assert evaluator.data_of(["mmvp"], ["a=b"]) == {"mmvp": "a=b"}
    assert evaluator.data_of(["drift", "mmvp"], ["mmvp=a=b", "drift=c"]) == {"drift": "c", "mmvp": "a=b"}
    assert evaluator.labels_of(["a/x", "b/y"], [None, 3]) == ["x", "y:3"]
    assert evaluator.labels_of(["a/x", "b/x/"], [None, None]) == ["a/x", "b/x/"]


def test_wrong_steps_and_backbones_are_refused(workdir, config, tmp_path):
    refused("--weights=.*:3 has no checkpoint in .*: use one of 2, 5", origins.find, f"{workdir}:3", "--weights")
    refused("--weights='.*/none' does not exist", origins.find, str(tmp_path / "none"), "--weights")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text("{}")
    refused("has no checkpoint yet", origins.find, str(tmp_path), "--weights")
    other = eval_config(CLIP, workdir)
    other.backbone.width = 60
    with pytest.raises(UserError, match="the run .* than config.backbone: width is 48 there and 60 in"):
        encode.read(str(workdir), 5, other, partition.make_mesh(other.mesh))


def test_live_parameters_in_training(config, data, base, workdir):
    """Parameters sharded over the mesh as in training are compared with the initial encoder."""
    config.mesh.update(fsdp=4, min_shard=64)
    mesh = partition.make_mesh(config.mesh)
    runner = evaluator.Evaluator(config, mesh, data)
    begun = encode.read(str(base), None, config, mesh).vision
    assert any(len(a.sharding.device_set) == 8 and not a.is_fully_replicated for a in begun.values())
    found, notes = runner.scalars({"vision": begun}, {})
    assert not notes
    assert found["eval/drift/cosine"] == pytest.approx(1) and found["eval/drift/knn_overlap"] == 100
    assert found["eval/mmvp/pooled_change"] == 0
    assert 0 < found["eval/mmvp/pooled"] < 100 and all(type(v) is float for v in found.values())
    moved, _ = runner.scalars({"vision": encode.read(str(workdir), 5, config, mesh).vision}, {})
    assert moved["eval/drift/cosine"] < 0.999 and set(moved) == set(found)
