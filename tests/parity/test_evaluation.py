"""Scores, probes and class lists against CLIP_benchmark, scikit-learn and timm; evaluations of checkpoints of runs."""

import collections
import csv
import json
import shutil
from pathlib import Path

import commands
import numpy as np
import pytest
import small
import timm.data
import torch
import trees
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import linear_probe, zeroshot_classification, zeroshot_retrieval
from clip_benchmark.models.open_clip import load_open_clip
from eval_data import encoded, eval_config, patch, write_class_folders, write_mmvp
from helpers import close, refused, tensors
from open_clip.tokenizer import default_bpe
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score
from specs import EVAL_CLIP as CLIP
from torch_models import centred, torch_model, written_by_open_clip

from diva_jax.evals import encode, evaluator
from diva_jax.evals.tasks import probe, robustness, zeroshot
from diva_jax.report import evaluation, inputs, page
from diva_jax.training import checkpoint, partition, workdirs
from diva_jax.weights import formats, origins
from diva_jax.weights.formats import write_safetensors

WORDS = "zero one two three four five six seven eight nine".split()
TEMPLATES = ["a photo of the number: {c}.", "the digit {c}", 'a {c}, "hand-written".']
CAPTIONS = 83


DIGITS = load_digits()


def digit(i: int) -> Image.Image:
    return Image.fromarray((DIGITS.images[i] * 15).astype(np.uint8)).convert("RGB")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = centred(torch_model(CLIP), CLIP, [digit(i) for i in range(0, 1500, 30)], [f"the digit {w}" for w in WORDS])
    folder = tmp_path_factory.mktemp("runs") / "exported"
    written_by_open_clip(folder, CLIP, model)
    shutil.copy(default_bpe(), folder / "bpe_simple_vocab_16e6.txt.gz")
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """297 digits of scikit-learn, 8 x 8 pixels, in two shards."""
    root, labels = tmp_path_factory.mktemp("digits"), DIGITS.target
    tree = {"test/nshards.txt": "2\n", "classnames.txt": "\n".join(WORDS) + "\n"}
    tree["zeroshot_classification_templates.txt"] = "\n".join(TEMPLATES) + "\n"
    for shard, rows in enumerate((range(1500, 1700), range(1700, 1797))):
        members = {f"s{i:07d}.cls": str(labels[i]) for i in rows} | {f"s{i:07d}.png": encoded(digit(i)) for i in rows}
        tree[f"test/{shard}.tar"] = dict(sorted(members.items()))
    trees.change(root, tree)
    return root


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """Photographs with one to five captions each, as Flickr30k and COCO are packed."""
    root, members = tmp_path_factory.mktemp("captions"), {}
    for i in range(CAPTIONS):
        words = [WORDS[(i + 3 * j) % 10] for j in range(1 + i % 5)]
        texts = [f"{word} {WORDS[i % 7]} things, number {i * 10 + j}, at noon!" for j, word in enumerate(words)]
        members |= {f"s{i:07d}.jpg": encoded(patch(i), "JPEG"), f"s{i:07d}.txt": "\n".join(texts)}
    trees.change(root, {"test/0.tar": members, "test/nshards.txt": "1\n", "dataset_type.txt": "retrieval\n"})
    return root


def accuracy(scores, labels, topk):
    """scikit-learn's, in place of theirs, whose float(array of shape [1]) numpy no longer allows."""
    return [top_k_accuracy_score(labels, scores, k=k, labels=range(scores.shape[1])) for k in topk]


def theirs(exported, root, task):
    model, transform, tokenizer = load_open_clip(f"local-dir:{exported}")
    data = build_dataset("wds/small", root=str(root), transform=transform, split="test", task=task)
    loader = torch.utils.data.DataLoader(data.batched(64), batch_size=None, num_workers=0)
    if task == "zeroshot_retrieval":
        return zeroshot_retrieval.evaluate(model.eval(), loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    loader.dataset.classes = data.classes
    words = (tokenizer, data.classes, data.templates)
    return zeroshot_classification.evaluate(model.eval(), loader, *words, "cpu", amp=False)


def ours(exported, root, task, batch_size=50):
    config = eval_config(CLIP, exported)
    config.eval.update(bootstrap=500, batch_size=batch_size)
    mesh = partition.make_mesh(config.mesh)
    runner = evaluator.Evaluator(config, mesh, {task: str(root)})
    return runner.evaluate(runner.model("exported", encode.read(str(exported), None, config, mesh)))[task]


@pytest.mark.parametrize("task", ["zeroshot_classification", "zeroshot_retrieval"])
def test_scores_are_clip_benchmarks(exported, digits, captions, monkeypatch, task):
    monkeypatch.setattr(zeroshot_classification, "accuracy", accuracy)
    classifies = task == "zeroshot_classification"
    root = digits if classifies else captions
    want, found = theirs(exported, root, task), ours(exported, root, "zeroshot" if classifies else "retrieval")
    scores = {k: v["score"] for k, v in found.results["scores"].items()}
    assert set(scores) == set(want)
    for metric, value in want.items():
        if classifies:
            assert round(scores[metric] / 100, 12) == round(value, 12), metric
        else:  # They average in float32.
            assert np.float32(scores[metric] / 100) == np.float32(value), metric
    few, many = ("acc1", "acc5") if classifies else ("text_retrieval_recall@5", "text_retrieval_recall@10")
    assert 0 < scores[few] < scores[many] < 100, "a test of nothing"
    assert not classifies or len({r["predicted"] for r in found.rows}) > 2, "a test of nothing"


@pytest.mark.parametrize("decay", [1e-4, 1e-2, 1.0])
def test_fit_is_scikit_learns_logistic_regression(decay):
    x, y = DIGITS.data, DIGITS.target
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    train, test = slice(0, 700), slice(700, 1100)
    oracle = LogisticRegression(C=1 / (decay * 700), tol=1e-8, max_iter=5000).fit(x[train], y[train])
    weights, biases = probe.fit(x[train], y[train], 10, decay, 1000)
    want = oracle.decision_function(x[test])
    got = x[test] @ weights + biases
    # The softmax does not change with a common offset of the biases.
    want, got = (z - z.mean(axis=1, keepdims=True) for z in (want, got))
    close(got, want, 2e-3)
    assert (got.argmax(axis=1) == want.argmax(axis=1)).mean() > 0.997


@pytest.mark.parametrize("seed", range(8))
def test_search_is_clip_benchmarks(seed, monkeypatch):
    """Its loop over its own `find_peak`, with the accuracy of each weight decay given."""
    accuracies = np.random.default_rng(seed).integers(1, 9, 97) / 10
    monkeypatch.setattr(linear_probe, "train", lambda a, b, c, weight_decay, *rest: weight_decay)
    by_decay = dict(zip(probe.DECAYS.tolist(), accuracies, strict=True))
    monkeypatch.setattr(linear_probe, "infer", lambda model, *rest: (torch.tensor(by_decay[model]),) * 2)
    monkeypatch.setattr(linear_probe, "accuracy", lambda logits, target, topk: [float(logits)])
    decays = probe.DECAYS.tolist()

    def find(numbers):
        return linear_probe.find_peak(decays, numbers, *[None] * 9, seed)

    best, span = find(range(0, 97, 16)), 8
    np.testing.assert_allclose(np.logspace(-6, 2, 7), probe.DECAYS[::16])
    while span > 0:
        best = find([max(best - span, 0), best, min(best + span, 96)])
        span //= 2
    assert probe.search(lambda i: accuracies[i]) == best


INFO = Path(timm.data.__file__).with_name("_info")


@pytest.mark.parametrize("name", ["a", "r"])
def test_folders_give_timms_indices(tmp_path, name):
    wnids = (INFO / f"imagenet_{name}_synsets.txt").read_text().split()
    for wnid in reversed(wnids):
        (tmp_path / wnid).mkdir()
        (tmp_path / wnid / "0.png").touch()
    found = robustness.read_set(name, tmp_path, False)
    by_label = {label: name.split("/")[0] for name, label in zip(found.names, found.targets, strict=True)}
    indices = [zeroshot.imagenet("wnids").index(by_label[i]) for i in range(200)]
    assert indices == [int(i) for i in (INFO / f"imagenet_{name}_indices.txt").read_text().split()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    images = write_class_folders(root / "images", [i % 3 for i in range(12)], ["cup", "logo", "rocket"])
    return {"mmvp": str(write_mmvp(root / "mmvp")), "drift": str(images)}


@pytest.fixture
def config(exported):
    c = eval_config(CLIP, exported)
    c.eval.update(bootstrap=300, batch_size=32)
    c.eval.mmvp.seeds, c.eval.drift.neighbours = 2, 3
    return c


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, exported):
    """A run that trains only the last block, with checkpoints of steps 2 and 5."""
    return trained_run(tmp_path_factory.mktemp("runs") / "tuned", exported, seed=0)


def trained_run(folder, base, seed: int):
    c = small.diva_config(trainable=(("vision/blocks/1/.*", 1.0), ("visual_proj/.*", 1.0), (".*", 0.0)), seed=seed)
    c.backbone = eval_config(CLIP, base).backbone
    workdirs.write_config(folder, c)
    program = small.program(c)
    began = {"source": ["x"], "sha256": formats.fingerprint(origins.open_source(str(base)).tensors.files)}
    meta = {"sources": {"vision": began}, "config": json.loads(c.to_json())}
    with checkpoint.Checkpoints(folder) as checkpoints:
        for step in (2, 5):
            arrays = small.random_arrays(program, seed=step + 10 * seed)
            checkpoints.save(step, program.init_state(arrays), {}, meta, wait=True)
    return folder


def test_a_vision_tower_alone_has_the_configs_text_tower(config, exported, tmp_path):
    """DIVA's authors publish their encoders in this form."""
    tower = tensors(torch_model(CLIP, seed=8).visual)
    write_safetensors(tmp_path / "tuned.safetensors", tower)
    found = encode.read(str(tmp_path / "tuned.safetensors"), None, config, partition.make_mesh(config.mesh))
    assert found.source == str(exported) and found.text is None
    np.testing.assert_array_equal(found.vision["class_embed"], tower["class_embedding"])


def test_runs_of_other_seeds_and_several_checkpoints(tmp_path, data, exported, workdir):
    others = [trained_run(tmp_path / f"s{seed}", exported, seed) for seed in (1, 2, 3)]
    group = "tuned=" + ",".join(f"{other}:5" for other in others)
    tower = {name: t * np.nan for name, t in tensors(torch_model(CLIP, seed=8).visual).items()}
    write_safetensors(tmp_path / "nan.safetensors", tower)
    args = [f"--weights={w}" for w in (exported, group, tmp_path / "nan.safetensors", f"{workdir}:2", f"{workdir}:5")]
    args += [f"--config=custom:{exported}", "--control=tuned", "--best", "--task=mmvp,drift"]
    args += [f"--data={task}={path}" for task, path in data.items()]
    args += [f"--config.eval.{o}" for o in ("bootstrap=300", "mmvp.seeds=2", "batch_size=50", "drift.neighbours=3")]
    code, printed, said = commands.run("evaluate", *args, f"--out={tmp_path / 'out'}")
    lost = f"nan.safetensors has no scores ({tmp_path}/nan.safetensors: the tensor "  # All others have scores.
    assert code == 1 and f"error: {lost}" in said
    assert f"{workdir}: the best of 2 checkpoints in MMVP-VLM, " in printed and "over 3 runs [" in printed
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["notes"][0].startswith(lost)
    members = [{"source": str(o), "step": 5, "checkpoint": checkpoint.identity(o, 5)} for o in others]
    assert found["weights"][1] == dict(label="tuned", members=members)
    assert list(found["tasks"]["mmvp"]["weights"]) == [exported.name, "tuned", "tuned:2", "tuned:5"]
    for task, metric, kind in (("mmvp", "pooled_match", "difference"), ("drift", "cosine", "score")):
        compared = {(c["before"], c["after"]): c["scores"] for c in found["tasks"][task]["comparisons"]}
        own = compared[exported.name, "tuned"][metric]
        assert len(own["runs"]) == 3 and own[kind] == pytest.approx(np.mean(own["runs"]))
        assert own["runs_interval"][0] < own[kind] < own["runs_interval"][1]
        assert len(compared["tuned", "tuned:5"][metric]["runs"]) == 3
    (said,) = [s for s in found["summary"] if (s["before"], s["after"]) == (exported.name, "tuned")]
    assert "over 3 runs [" in said["detail"]
    with open(tmp_path / "out" / "predictions.csv") as f:
        rows = [(row["task"], row["weights"], row["metric"], row["item"]) for row in csv.DictReader(f)]
    for metric in ("cosine", "knn_overlap"):  # Of every run, with the reference alone.
        items = collections.Counter(row[1] for row in set(rows) if row[0] == "drift" and row[2] == metric)
        assert items.keys() == {"s1:5", "s2:5", "s3:5", "tuned:2", "tuned:5"} and len({*items.values()}) == 1
        assert items.total() == len([row for row in rows if row[0] == "drift" and row[2] == metric])
    read = inputs.read(tmp_path / "out")
    assert f"{others[0]}, step 5; {others[1]}, step 5" in page.html(read, page.sections(read))
    assert any("About the weights" in str(alarm.what) for alarm in evaluation.alarms(read))
    assert page.sections(read)[0].title == "MMVP-VLM"
    wrong = [f"--weights={exported}", f"--weights=tuned={workdir}:2,{others[0]}", f"--out={tmp_path / 'wrong'}"]
    wrong += [a for a in args if not a.startswith("--weights")]
    assert "are not runs at one step: give WORKDIR:STEP" in commands.refused("evaluate", *wrong)


def test_the_tokenizer_may_come_from_elsewhere(tmp_path, config, data, exported):
    (tmp_path / "open_clip_model.safetensors").hardlink_to(exported / "open_clip_model.safetensors")
    mesh = partition.make_mesh(config.mesh)
    bare = encode.Encoder({}, None, str(tmp_path), {}, str(tmp_path))
    runner = evaluator.Evaluator(config, mesh, {"mmvp": data["mmvp"]})
    refused("has no tokenizer: it needs tokenizer.json", runner.model, "bare", bare)
    config.eval.tokenizer = str(exported)
    runner = evaluator.Evaluator(config, mesh, {"mmvp": data["mmvp"]})
    assert runner.model("bare", bare).embeddings.shape == (270, CLIP.embed_dim)


def test_the_data_of_tasks():
    assert evaluator.data_of(["mmvp"], ["a=b"]) == {"mmvp": "a=b"}
    assert evaluator.data_of(["drift", "mmvp"], ["mmvp=a=b", "drift=c"]) == {"drift": "c", "mmvp": "a=b"}
    for tasks, given, says in json.loads(Path(__file__).with_name("refused.json").read_text())["data_of"]:
        refused(says, evaluator.data_of, tasks, given)


def test_a_run_of_another_backbone_is_refused(workdir):
    other = eval_config(CLIP, workdir)
    other.backbone.width = 60
    says = "the run .* than config.backbone: width is 48 there and 60 in"
    refused(says, encode.check, str(workdir), 5, other, False)
