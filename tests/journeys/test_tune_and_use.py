"""From weights to a tuned encoder in somebody else's code: train, evaluate, report, export, load, encode."""

import csv
import json
import re

import commands
import numpy as np
import pytest
from eval_data import encoded, patch

from diva_jax.evals.results import COLUMNS

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
ENCODE_OPEN_CLIP = "images, words = model.encode_image(preprocess(image)[None]), model.encode_text(tokenizer(texts))"
ENCODE_TRANSFORMERS = """images = model.get_image_features(**processor(images=image, return_tensors="pt")).pooler_output
    words = model.get_text_features(**tokenizer(texts, padding="max_length", return_tensors="pt")).pooler_output"""
BEFORE = 'import open_clip\nclip, _, preprocess = open_clip.create_model_and_transforms("local-dir:{kept}")\n'


def snippet(home, fmt: str) -> str:
    """Returns the Python of an export's model card."""
    (code,) = re.findall(r"```python\n(.*?)```", (home / fmt / "README.md").read_text(), re.S)
    return code


@pytest.fixture(scope="module")
def ours(home, exported, kept):
    """Embeddings by diva_jax itself of the run, the open_clip export and the CLIP before tuning."""
    for name in ("image.png", "image.jpg"):  # The second is that of the cards.
        (home / name).write_bytes(encoded(patch(3)))
    return home.python(
        f"""
import json, numpy as np, diva_jax
from PIL import Image
image, out = Image.open("image.png"), {{}}
for name in ("runs/tuned", "open_clip", {str(kept)!r}):
    model = diva_jax.load(name)
    embeddings = (np.asarray(model.encode_image([image])), np.asarray(model.encode_text({TEXTS!r})))
    images, words = ((x / np.linalg.norm(x, axis=-1, keepdims=True)).tolist() for x in embeddings)
    out[name] = dict(image=images[0], texts=words)
out["kept"] = out.pop({str(kept)!r})
print(json.dumps(out))
"""
    )


def test_training_says_what_to_do_next_and_is_done_once(home, tuned):
    assert "done: 3 steps; export with python -m diva_jax.export_torch --workdir=runs/tuned" in tuned
    rows = [json.loads(line) for line in (home / "runs/tuned/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 3 and all(np.isfinite(r["loss"]) for r in rows if "loss" in r)


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
        assert (comparison["before"], comparison["after"]) == ("clip", "tuned:3")
        assert task["title"] in evaluated
        for weights in task["weights"].values():
            assert all(np.isfinite(s["score"]) for s in weights["scores"].values() if s["score"] is not None), name


def test_the_generator_is_scored_as_encoders_are(home, evaluated):
    """One command, the four numbers of the same sets; the same for all weights, which a note says."""
    tasks = json.loads((home / "results/results.json").read_text())["tasks"]
    judge = tasks["judge"]
    kinds = {info["answers"] for info in judge["metrics"].values()}
    assert kinds == {"image", "text", "group", "match"} and judge["count"] == 3
    before, after = judge["weights"].values()
    assert before == after and all(s["interval"] for s in before["scores"].values())
    assert "whatever the weights: 2 draws per image of timesteps 300 to 999" in evaluated


def test_a_flag_that_is_missing_is_named(home, evaluated):
    line = ("--config=world", "--weights=runs/tuned", "--task=drift", f"--data=drift={home.data['drift']}")
    assert "--out is missing" in commands.refused("evaluate", *line, cwd=home.folder)


def test_reports_of_the_evaluation_and_of_the_run(home, evaluated):
    pages = {}
    for folder in ("results", "runs/tuned"):
        assert f"Wrote {folder}/report.html" in home.run("report", folder)
        pages[folder] = (home / folder / "report.html").read_text()
        assert "cannot be read" not in pages[folder]
    results = json.loads((home / "results/results.json").read_text())
    for task in results["tasks"].values():
        assert task["title"] in pages["results"]
    assert "Training" in pages["runs/tuned"]


def test_cards_have_the_scores_and_the_origin(home, exported):
    for fmt, printed in exported.items():
        card = (home / fmt / "README.md").read_text()
        assert "bit-identical" in printed and "largest difference" in printed
        assert "MMVP-VLM" in card and "run `runs/tuned`, step 3" in card
        for part in ("?seed=", "sha256", "jax ", '"batch_size": 8'):
            assert part in card, part
    again = ("--workdir=runs/tuned", "--out=hf", "--step=3")
    assert "exists already" in commands.refused("export_torch", *again, cwd=home.folder)


def predictions(home, folder: str, weights: str) -> list[dict]:
    with open(home / folder / "predictions.csv", newline="") as f:
        rows = csv.DictReader(f)
        assert tuple(rows.fieldnames[: len(COLUMNS)]) == COLUMNS
        found = [row for row in rows if row["weights"] == weights and row["task"] not in ("feedback", "drift")]
        return [{column: row[column] for column in COLUMNS} for row in found]


def test_every_export_has_the_scores_of_the_run_in_every_task(home, exported):
    # The feedback is the run's own, whose generator an export does not have.
    data = {task: path for task, path in home.data.items() if task != "feedback"}
    home.evaluate(data, ("runs/tuned", "open_clip", "hf", "pt/vision_tower.pth"), "again")
    tasks, before = (json.loads((home / f / "results.json").read_text())["tasks"] for f in ("again", "results"))
    for name, task in tasks.items():
        run, *exports = (weights["scores"] for weights in task["weights"].values())
        assert len(exports) == 3 and all(scores == run for scores in exports), name
        assert run == before[name]["weights"]["tuned:3"]["scores"], name
    assert predictions(home, "again", "tuned:3") == predictions(home, "results", "tuned:3")


def test_ours_agree(ours):
    assert ours["runs/tuned"] == ours["open_clip"]
    assert ours["open_clip"]["texts"] == ours["kept"]["texts"], "the text tower was not tuned"
    assert np.abs(np.subtract(ours["open_clip"]["image"], ours["kept"]["image"])).max() > 1e-3


def agree(theirs: dict, ours: dict) -> None:
    for key in theirs:
        np.testing.assert_allclose(theirs[key], ours[key], atol=1e-5, err_msg=key)


def test_open_clip_encodes_an_image_and_a_text(home, exported, ours):
    code = SETUP + snippet(home, "open_clip") + ENCODE.format(texts=TEXTS, lines=ENCODE_OPEN_CLIP)
    agree(home.python(code), ours["open_clip"])


def test_transformers_encodes_an_image_and_a_text(home, exported, ours):
    code = SETUP + snippet(home, "hf") + ENCODE.format(texts=TEXTS, lines=ENCODE_TRANSFORMERS)
    theirs = home.python(code)
    # transformers rounds the resized pixels in another place, see docs/MLLM.md.
    np.testing.assert_allclose(theirs.pop("image"), ours["open_clip"]["image"], rtol=0, atol=5e-3)
    agree(theirs, ours["open_clip"])


def test_a_state_dict_in_a_model_of_open_clip(home, exported, ours, kept):
    lines = "images, words = clip.encode_image(preprocess(image)[None]), torch.zeros(1, 1)"
    code = SETUP + BEFORE.format(kept=kept) + snippet(home, "pt") + ENCODE.format(texts=TEXTS, lines=lines)
    agree({"image": home.python(code)["image"]}, ours["open_clip"])
