"""The notebook and the examples of docs/PYTHON.md run as written, each in an empty folder."""

import json
import os
import sys
import types

import numpy as np
import pages
import pytest
from places import ROOT

from diva_jax.common import log


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder, in which everything is written."""
    here, there = os.getcwd(), tmp_path_factory.mktemp("work")
    os.chdir(there)
    yield there
    os.chdir(here)
    log.keep_in(None)


@pytest.fixture(scope="module")
def notebook(folder):
    """The names that the notebook's cells define, and what its last cell shows; Jupyter itself is not needed."""
    shown, scope = [], {}
    display = types.ModuleType("IPython.display")
    display.IFrame = lambda *args: shown.append(args)
    for cell in json.loads((ROOT / "docs" / "quickstart.ipynb").read_text())["cells"]:
        assert not cell.get("outputs")
        source = "".join(cell["source"]) if cell["cell_type"] == "code" else ""
        with pytest.MonkeyPatch.context() as patch:
            if "IPython" in source:  # Not for all cells: flax looks for IPython too.
                # matplotlib asks a loaded IPython for its version.
                ipython = types.ModuleType("IPython")
                ipython.version_info = (9, 0, 0)
                patch.setitem(sys.modules, "IPython", ipython)
                patch.setitem(sys.modules, "IPython.display", display)
            exec(source, scope)  # noqa: S102
    return scope, shown


def test_the_notebook_loads_encodes_trains_and_shows_the_report(notebook, folder):
    scope, shown = notebook
    assert scope["images"].shape == (24, 48) and scope["texts"].shape == (2, 48)
    np.testing.assert_allclose(np.linalg.norm(scope["images"], axis=1), 1, atol=1e-5)
    rows = [json.loads(line) for line in (folder / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    # The time of the compilation is in none of the rows; a session's clock only goes up.
    assert max(r["images_per_s"] for r in rows) < 20 * min(r["images_per_s"] for r in rows)
    assert sorted(r["seconds"] for r in rows) == [r["seconds"] for r in rows]
    cosine = scope["results"]["tasks"]["drift"]["comparisons"][0]["scores"]["cosine"]["score"]
    assert 0.1 < cosine < 0.9999
    ((page, *_),) = shown
    html = (folder / page).read_text()
    assert "Run tiny: " in html and "Evaluation: " in html and "<h2>Drift</h2>" in html and "<h2>Training</h2>" in html


def test_the_examples_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (language, command), *python = pages.blocks("docs/PYTHON.md")
    assert language == "" and [kind for kind, _ in python] == ["python"] * 5
    pages.shell(command, tmp_path)
    scope = {}
    for _, code in python:
        exec(code, scope)  # noqa: S102
    log.keep_in(None)
    assert scope["cosines"].shape == (1, 2) and scope["batch"]["image"].shape == (8, 64, 64, 3)
    assert np.isfinite(scope["found"].loss) and set(scope["found"].gradients) == set(scope["loss"].params)
    card = (tmp_path / "runs/tuned/README.md").read_text()
    assert "## Scores" in card and "license: mit" in card and "local-dir:runs/tuned" in card
    # A run is loaded with what it has trained.
    import diva_jax

    image = "data/tiny/images/astronaut/0000.jpg"
    names = ("runs/tiny", "runs/tuned", "exports/mine", "data/tiny/clip")
    run, exported, own, before = (diva_jax.load(name) for name in names)
    assert run.step == 6 and before.step is None
    of_run, of_export, of_own, first = (e.encode_image(image, normalise=True)[0] for e in (run, exported, own, before))
    np.testing.assert_allclose(of_export, of_run, atol=1e-5)
    np.testing.assert_array_equal(of_own, scope["tuned"].encode_image(image, normalise=True)[0])
    assert 0.1 < of_run @ first < 0.9999 and 0.1 < of_own @ first < 0.9999999
    np.testing.assert_allclose(run.encode_text("a cup"), before.encode_text("a cup"), atol=1e-6)
