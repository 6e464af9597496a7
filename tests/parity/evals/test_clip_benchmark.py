"""Scores, probes and class lists against CLIP_benchmark, scikit-learn and timm."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import linear_probe, zeroshot_classification, zeroshot_retrieval
from clip_benchmark.models.open_clip import load_open_clip
from eval_data import encoded, eval_config, patch
from eval_models import centred, torch_model, write_model
from helpers import close
from PIL import Image
from records import write_tar
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from specs import EVAL_CLIP as CLIP

from diva_jax.evals import encode, evaluator
from diva_jax.evals.tasks import probe, robustness, zeroshot
from diva_jax.models.backbones.shared.open_clip_config import to_open_clip
from diva_jax.training import partition
from diva_jax.weights.writers import write_json

WORDS = "zero one two three four five six seven eight nine".split()
TEMPLATES = ["a photo of the number: {c}.", "the digit {c}", 'a {c}, "hand-written".']
CAPTIONS = 83


def digit(i: int) -> Image.Image:
    return Image.fromarray((load_digits().images[i] * 15).astype(np.uint8)).convert("RGB")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = centred(torch_model(CLIP), CLIP, [digit(i) for i in range(0, 1500, 30)], [f"the digit {w}" for w in WORDS])
    folder = write_model(tmp_path_factory.mktemp("exported"), model)
    write_json(folder / "open_clip_config.json", to_open_clip(CLIP))
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """297 digits of scikit-learn, 8 x 8 pixels, in two shards."""
    root = tmp_path_factory.mktemp("digits")
    (root / "test").mkdir()
    labels = load_digits().target
    for shard, rows in enumerate((range(1500, 1700), range(1700, 1797))):
        members = {}
        for i in rows:
            members |= {f"s{i:07d}.cls": str(labels[i]).encode(), f"s{i:07d}.png": encoded(digit(i))}
        write_tar(root / "test" / f"{shard}.tar", members)
    (root / "test" / "nshards.txt").write_text("2\n")
    (root / "classnames.txt").write_text("\n".join(WORDS) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    return root


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """Photographs with one to five captions each, as Flickr30k and COCO are packed."""
    root = tmp_path_factory.mktemp("captions")
    (root / "test").mkdir()
    members = {}
    for i in range(CAPTIONS):
        texts = [
            f"{WORDS[(i + 3 * j) % 10]} {WORDS[i % 7]} things, number {i * 10 + j}, at noon!" for j in range(1 + i % 5)
        ]
        members |= {f"s{i:07d}.jpg": encoded(patch(i), "JPEG"), f"s{i:07d}.txt": "\n".join(texts).encode()}
    write_tar(root / "test" / "0.tar", members)
    (root / "test" / "nshards.txt").write_text("1\n")
    (root / "dataset_type.txt").write_text("retrieval\n")
    return root


def accuracy():
    """Their `accuracy`, whose float(array of shape [1]) numpy no longer allows; nothing else is changed."""
    source = inspect.getsource(zeroshot_classification.accuracy)
    assert source.count(".cpu().numpy()") == 1
    names = {}
    exec(source.replace(".cpu().numpy()", ".item()"), names)
    return names["accuracy"]


def theirs(exported, root, task):
    name = f"local-dir:{exported}"
    model, transform, tokenizer = load_open_clip(name)
    data = build_dataset("wds/small", root=str(root), transform=transform, split="test", task=task)
    loader = torch.utils.data.DataLoader(data.batched(64), batch_size=None, num_workers=0)
    if task == "zeroshot_retrieval":
        ks = [1, 5, 10]
        return zeroshot_retrieval.evaluate(model.eval(), loader, tokenizer, "cpu", amp=False, recall_k_list=ks)
    loader.dataset.classes = data.classes
    return zeroshot_classification.evaluate(
        model.eval(), loader, tokenizer, data.classes, data.templates, "cpu", amp=False
    )


def ours(exported, root, task, batch_size=50):
    config = eval_config(CLIP, exported)
    config.eval.update(bootstrap=500, batch_size=batch_size)
    mesh = partition.make_mesh(config.mesh)
    runner = evaluator.Evaluator(config, mesh, {task: str(root)})
    loaded = encode.read(str(exported), None, config, mesh)
    return runner.evaluate(runner.model("exported", loaded))[task]


def test_classification(exported, digits, monkeypatch):
    monkeypatch.setattr(zeroshot_classification, "accuracy", accuracy())
    want, found = theirs(exported, digits, "zeroshot_classification"), ours(exported, digits, "zeroshot")
    scores = {k: v["score"] for k, v in found.results["scores"].items()}
    print(f"clip_benchmark {want}\ndiva_jax {scores}")
    assert set(scores) == set(want)
    for metric, value in want.items():
        assert round(scores[metric] / 100, 12) == round(value, 12), metric
    predicted = {r["predicted"] for r in found.rows}
    assert len(predicted) > 2 and 0 < scores["acc1"] < scores["acc5"] < 100, "a test of nothing"


def test_retrieval(exported, captions):
    want, found = theirs(exported, captions, "zeroshot_retrieval"), ours(exported, captions, "retrieval")
    scores = {k: v["score"] for k, v in found.results["scores"].items()}
    print(f"clip_benchmark {want}\ndiva_jax {scores}")
    assert set(scores) == set(want)
    for metric, value in want.items():
        # They average in float32.
        assert np.float32(scores[metric] / 100) == np.float32(value), metric
    assert 0 < scores["text_retrieval_recall@5"] < scores["text_retrieval_recall@10"] < 100, "a test of nothing"


@pytest.mark.parametrize("decay", [1e-4, 1e-2, 1.0])
def test_fit_is_scikit_learns_logistic_regression(decay):
    x, y = load_digits(return_X_y=True)
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
