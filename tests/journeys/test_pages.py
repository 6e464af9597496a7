"""The notebook and the examples of docs/PYTHON.md and README.md run as written and in their order. The page runs where
the notebook did, and finds the run that both train."""

import json
import re
import sys
import types

import commands
import numpy as np
import torch_setup  # noqa: F401
from helpers import rows
from PIL import Image
from places import ROOT

import diva_jax
from diva_jax.common import log

README = (ROOT / "README.md").read_text()


def test_the_notebook_loads_encodes_trains_and_shows_the_report(home, monkeypatch):
    """Jupyter itself is not needed."""
    monkeypatch.chdir(home)
    shown, scope = [], {}
    display = types.ModuleType("IPython.display")
    display.IFrame = lambda *args: shown.append(args)
    ipython = types.ModuleType("IPython")
    ipython.version_info = (9, 0, 0)  # matplotlib asks a loaded IPython for its version.
    for cell in json.loads((ROOT / "docs" / "quickstart.ipynb").read_text())["cells"]:
        assert not cell.get("outputs")
        source = "".join(cell["source"]) if cell["cell_type"] == "code" else ""
        with monkeypatch.context() as patch:
            if "IPython" in source:  # Not for all cells: flax looks for IPython too.
                patch.setitem(sys.modules, "IPython", ipython)
                patch.setitem(sys.modules, "IPython.display", display)
            exec(source, scope)  # noqa: S102
    log.keep_in(None)
    assert scope["images"].shape == (24, 48) and scope["texts"].shape == (2, 48)
    np.testing.assert_allclose(np.linalg.norm(scope["images"], axis=1), 1, atol=1e-5)
    found = rows(home / "runs/tiny")
    assert [r["step"] for r in found] == [1, 2, 3, 4, 5, 6]
    # The time of the compilation is in none of the rows; a session's clock only goes up.
    assert max(r["images_per_s"] for r in found) < 20 * min(r["images_per_s"] for r in found)
    assert sorted(r["seconds"] for r in found) == [r["seconds"] for r in found]
    assert 0.1 < scope["results"]["tasks"]["drift"]["comparisons"][0]["scores"]["cosine"]["score"] < 0.9999
    ((page, *_),) = shown
    html = (home / page).read_text()
    assert "Run tiny: " in html and "Evaluation: " in html and "<h2>Drift</h2>" in html and "<h2>Training</h2>" in html


def test_the_examples_of_docs_python(home, monkeypatch):
    monkeypatch.chdir(home)
    (language, command), *python = commands.blocks("docs/PYTHON.md")
    assert language == "" and [kind for kind, _ in python] == ["python"] * 5
    commands.shell(command, home)
    scope = {}
    for _, code in python:
        exec(code, scope)  # noqa: S102
    log.keep_in(None)
    assert scope["cosines"].shape == (1, 2) and scope["batch"]["image"].shape == (8, 64, 64, 3)
    assert np.isfinite(scope["found"].loss) and set(scope["found"].gradients) == set(scope["loss"].params)
    card = (home / "runs/tuned/README.md").read_text()
    assert "## Scores" in card and "license: mit" in card and "local-dir:runs/tuned" in card
    # A run is loaded with what it has trained.
    image = "data/tiny/images/astronaut/0000.jpg"
    names = ("runs/tiny", "runs/tuned", "exports/mine", "data/tiny/clip")
    run, exported, own, before = (diva_jax.load(name) for name in names)
    assert run.step == 6 and before.step is None
    of_run, of_export, of_own, first = (e.encode_image(image, normalise=True)[0] for e in (run, exported, own, before))
    np.testing.assert_allclose(of_export, of_run, atol=1e-5)
    np.testing.assert_array_equal(of_own, scope["tuned"].encode_image(image, normalise=True)[0])
    assert 0.1 < of_run @ first < 0.9999 and 0.1 < of_own @ first < 0.9999999
    np.testing.assert_allclose(run.encode_text("a cup"), before.encode_text("a cup"), atol=1e-6)


def test_the_examples_of_the_readme(tmp_path, monkeypatch):
    """In a folder with what the commands need of a clone."""
    for name in ("configs", "docs", "diva_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    scope, (five_lines, in_open_clip) = {}, re.findall(r"```python\n(.*?)```", README, re.S)
    full_size, small = [code for language, code in commands.blocks("README.md") if ".main --config=configs/" in code]
    exec(five_lines, scope)  # noqa: S102
    assert (scope["images"] @ scope["texts"].T).shape == (1, 2)
    assert [line.split()[2] for line in full_size.splitlines()] == ["diva_jax.main", "diva_jax.export_torch"]
    # The test is about the commands, so the run has few and small steps.
    few = " --config.steps=1 --config.condition.warmup_steps=1 --config.batch_size=8"
    lines = [line + few * (".main " in line) for line in small.strip().splitlines()]
    outputs = [commands.shell(line, tmp_path) for line in lines]
    assert len(outputs) == 5 and (tmp_path / "runs/small_eval/report.html").exists()
    assert "steps are done" in commands.shell(lines[1], tmp_path)
    exec(in_open_clip, scope)  # noqa: S102
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8))
    features = scope["model"].encode_image(scope["preprocess"](image)[None]).detach().numpy()
    assert features.shape == (1, 64) and np.isfinite(features).all()


def test_files_and_commands_that_the_readme_names_exist():
    for path in set(re.findall(r"\b(?:configs|docs|tests|diva_jax|tpu)/[\w/.]+\w", README)):
        assert (ROOT / path).exists(), path
    for module in set(re.findall(r"python -m diva_jax\.(\w+)", README)):
        assert (ROOT / "diva_jax" / f"{module}.py").exists() or (ROOT / "diva_jax" / module).is_dir(), module
    assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in re.findall(r"^make (\w+)", README, re.M))
