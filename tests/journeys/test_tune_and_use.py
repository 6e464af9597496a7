"""From weights to a tuned encoder in somebody else's code: train, evaluate, report, export, load, encode. Commands run
in one folder, `home`, with relative paths, as in the README."""

import csv
import json
import re

import commands
import jax
import numpy as np
import pytest
from eval_data import encoded, patch, write_task_data
from helpers import rows

import diva_jax
from diva_jax.evals.results import COLUMNS
from diva_jax.world import models

KEPT = models.WEIGHTS / models.CLIP  # That the run begins with.
TEXTS = ["a photo of two red circles", "a small blue square above a star"]
# open_clip imports torchvision, which does not start beside every build of PyTorch.
SETUP = "import torch_setup\n"
# After the card's own lines: what a user does next. Every format prints the same embeddings.
ENCODE = """
import json, torch
from PIL import Image
image, texts = Image.open("image.png").convert("RGB"), {texts!r}
with torch.no_grad():
    {lines}
images, words = (torch.nn.functional.normalize(x, dim=-1).tolist() for x in (images, words))
print(json.dumps(dict(image=images[0], texts=words)))
"""
# Format -> lines of its library; a state dict of a tower goes into a model of open_clip.
LINES = {
    "open_clip": "images, words = model.encode_image(preprocess(image)[None]), model.encode_text(tokenizer(texts))",
    "hf": """images = model.get_image_features(**processor(images=image, return_tensors="pt")).pooler_output
    words = model.get_text_features(**tokenizer(texts, padding="max_length", return_tensors="pt")).pooler_output""",
    "pt": "images, words = clip.encode_image(preprocess(image)[None]), clip.encode_text(tokenizer(texts))",
}
BEFORE = """import open_clip
name = "local-dir:{kept}"
clip, _, preprocess = open_clip.create_model_and_transforms(name)
tokenizer = open_clip.get_tokenizer(name)
"""


def evaluate(home, data: dict[str, str], weights, out: str) -> str:
    """Evaluates weights on tasks, into the folder `out`; returns what the command printed."""
    quick = {"bootstrap": 100, "batch_size": 32, "mmvp.seeds": 2, "drift.neighbours": 3, "probe.neighbours": 3}
    quick |= {"probe.iterations": 20, "feedback.images": 4, "feedback.draws": 2, "judge.draws": 2}
    quick |= {f"{task}.allow_partial": True for task in ("choice", "judge", "robustness", "segmentation")}
    flags = [f"--weights={w}" for w in weights] + [f"--data={task}={path}" for task, path in data.items()]
    flags += [f"--config.eval.{field}={value}" for field, value in quick.items()]
    flags += [f"--task={','.join(data)}", f"--out={out}"]
    return commands.succeed("evaluate", "--config=world", *flags, cwd=home)


@pytest.fixture(scope="module")
def data(home):
    return write_task_data(home / "data")


@pytest.fixture(scope="module")
def tuned(home):
    """Trains `runs/tuned` from the kept models of the world, few steps and images; returns what the command printed."""
    short = ("--config.steps=2", "--config.condition.warmup_steps=1", "--config.batch_size=8", "--config.optim.lr=3e-3")
    return commands.succeed("main", "--config=world", "--workdir=runs/tuned", *short, cwd=home)


@pytest.fixture(scope="module")
def evaluated(home, tuned, data):
    """Evaluates the kept CLIP and the tuned one on every task, into `results`; returns what the command printed."""
    return evaluate(home, data, (KEPT, "runs/tuned"), "results")


@pytest.fixture(scope="module")
def exported(home, evaluated):
    """Exports the run in every format, into the folder of the format's name; returns what the commands printed."""
    flags = ("--workdir=runs/tuned", "--results=results/results.json")
    return {f: commands.succeed("export_torch", *flags, f"--out={f}", f"--format={f}", cwd=home) for f in LINES}


@pytest.fixture(scope="module")
def ours(home, exported):
    """Embeddings by diva_jax itself of the run, the open_clip export and the CLIP before tuning."""
    for name in ("image.png", "image.jpg"):  # The second is that of the cards.
        (home / name).write_bytes(encoded(patch(3)))
    found = []
    for name in (home / "runs/tuned", home / "open_clip", KEPT):
        model = diva_jax.load(str(name))
        image, texts = model.encode_image([str(home / "image.png")], normalise=True), model.encode_text(TEXTS, True)
        found.append(dict(image=np.asarray(image[0]), texts=np.asarray(texts)))
    tuned, exported, kept = found
    jax.tree.map(np.testing.assert_array_equal, tuned, exported)
    np.testing.assert_array_equal(exported["texts"], kept["texts"], "the text tower was not tuned")
    assert np.abs(exported["image"] - kept["image"]).max() > 1e-3
    return exported


def test_training_says_what_to_do_next_and_is_done_once(home, tuned):
    assert "done: 3 steps; export with python -m diva_jax.export_torch --workdir=runs/tuned" in tuned
    found = rows(home / "runs/tuned")
    assert found[-1]["step"] == 3 and all(np.isfinite(r["loss"]) for r in found if "loss" in r)


def test_every_task_is_scored_and_compared(home, evaluated):
    results = json.loads((home / "results/results.json").read_text())
    assert len(results["tasks"]) == 10 and "wrote results/results.json" in evaluated and "clip -> tuned:3" in evaluated
    assert {p.name for p in (home / "results").iterdir()} >= {"predictions.csv", "results.json"}
    assert results["schema"] == 1 and results["devices"].startswith("1 x ") and results["seconds"] > 0
    assert [(w["label"], w["step"]) for w in results["weights"]] == [("clip", None), ("tuned:3", 3)]
    assert results["options"]["batch_size"] == 32 and results["options"]["mmvp"] == {"seeds": 2}
    assert results["config"]["backbone"]["arch"] == "vit" and "jax" in results["versions"]
    for name, task in results["tasks"].items():
        assert list(task["weights"]) == ["clip", "tuned:3"], name
        (comparison,) = task["comparisons"]
        assert bool(comparison["scores"]) == (name != "judge"), name
        assert (comparison["before"], comparison["after"]) == ("clip", "tuned:3") and task["title"] in evaluated
        for weights in task["weights"].values():
            assert all(np.isfinite(s["score"]) for s in weights["scores"].values() if s["score"] is not None), name


def test_the_generator_is_scored_as_encoders_are(home, evaluated):
    """One command, the four numbers of the same sets; the same for all weights, which a note says."""
    judge = json.loads((home / "results/results.json").read_text())["tasks"]["judge"]
    assert {info["answers"] for info in judge["metrics"].values()} == {"image", "text", "group", "match"}
    before, after = judge["weights"].values()
    assert before == after and all(s["interval"] for s in before["scores"].values()) and judge["count"] == 5
    assert "whatever the weights: 2 draws per image of timesteps 300 to 999" in evaluated


def test_reports_of_the_evaluation_and_of_the_run(home, evaluated):
    pages = {}
    for folder in ("results", "runs/tuned"):
        assert f"Wrote {folder}/report.html" in commands.succeed("report", folder, cwd=home)
        pages[folder] = (home / folder / "report.html").read_text()
        assert "cannot be read" not in pages[folder]
    results = json.loads((home / "results/results.json").read_text())
    for task in results["tasks"].values():
        assert task["title"] in pages["results"]
    assert "Training" in pages["runs/tuned"]


def test_cards_have_the_scores_and_the_origin_and_nothing_is_written_twice(home, data, exported):
    for fmt, printed in exported.items():
        card = (home / fmt / "README.md").read_text()
        assert "bit-identical" in printed and "largest difference" in printed
        assert "MMVP-VLM" in card and "run `runs/tuned`, step 3" in card
        for part in ("?seed=", "sha256", "jax ", '"batch_size": 8'):
            assert part in card, part
    again = ("--workdir=runs/tuned", "--out=hf", "--step=3")
    assert "exists already" in commands.refused("export_torch", *again, cwd=home)
    line = ("--config=world", "--weights=runs/tuned", "--task=drift", f"--data=drift={data['drift']}")
    assert "--out is missing" in commands.refused("evaluate", *line, cwd=home)


def predictions(home, folder: str, weights: str) -> list[dict]:
    with open(home / folder / "predictions.csv", newline="") as f:
        table = csv.DictReader(f)
        assert tuple(table.fieldnames[: len(COLUMNS)]) == COLUMNS
        found = [row for row in table if row["weights"] == weights and row["task"] not in ("feedback", "drift")]
        return [{column: row[column] for column in COLUMNS} for row in found]


def test_every_export_has_the_scores_of_the_run_in_every_task(home, data, exported):
    # The feedback is the run's own, whose generator an export does not have.
    others = {task: path for task, path in data.items() if task != "feedback"}
    evaluate(home, others, ("runs/tuned", "open_clip", "hf", "pt/vision_tower.pth"), "again")
    tasks, before = (json.loads((home / f / "results.json").read_text())["tasks"] for f in ("again", "results"))
    for name, task in tasks.items():
        run, *exports = (weights["scores"] for weights in task["weights"].values())
        assert len(exports) == 3 and all(scores == run for scores in exports), name
        assert run == before[name]["weights"]["tuned:3"]["scores"], name
    assert predictions(home, "again", "tuned:3") == predictions(home, "results", "tuned:3")


@pytest.mark.parametrize("fmt", LINES)
def test_its_library_encodes_an_image_and_a_text(home, exported, ours, fmt):
    """By the lines of the export's model card."""
    (code,) = re.findall(r"```python\n(.*?)```", (home / fmt / "README.md").read_text(), re.S)
    before = BEFORE.format(kept=KEPT) if fmt == "pt" else ""
    (home / "snippet.py").write_text(SETUP + before + code + ENCODE.format(texts=TEXTS, lines=LINES[fmt]))
    theirs = json.loads(commands.succeed(home / "snippet.py", cwd=home).splitlines()[-1])
    # transformers rounds the resized pixels in another place, see docs/MLLM.md.
    np.testing.assert_allclose(theirs["image"], ours["image"], rtol=0, atol=5e-3 if fmt == "hf" else 1e-5)
    np.testing.assert_allclose(theirs["texts"], ours["texts"], rtol=0, atol=1e-5)
