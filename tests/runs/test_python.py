"""The notebook and the examples of docs/PYTHON.md run as written, in this order, on the demo's files."""

import json
import os
import re
import sys
import types

import numpy as np
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


def test_the_examples_of_the_page_run(notebook, folder):
    page = (ROOT / "docs" / "PYTHON.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 4
    scope = {}
    for block in blocks:
        exec(block, scope)  # noqa: S102
    assert scope["cosines"].shape == (1, 2) and scope["batch"]["image"].shape == (8, 64, 64, 3)
    assert np.isfinite(scope["found"].loss) and set(scope["found"].gradients) == set(scope["loss"].params)
    card = (folder / "runs/tuned/README.md").read_text()
    assert "## Scores" in card and "license: mit" in card and "local-dir:runs/tuned" in card
    # A run is loaded with what it has trained.
    import diva_jax

    tuned, before = diva_jax.load("runs/tiny"), diva_jax.load("data/tiny/clip")
    picture = "data/tiny/pictures/astronaut/0000.jpg"
    a, b = (e.encode_image(picture, normalise=True)[0] for e in (tuned, before))
    assert tuned.step == 6 and before.step is None and 0.1 < a @ b < 0.9999
    exported = diva_jax.load("runs/tuned").encode_image(picture, normalise=True)[0]
    np.testing.assert_allclose(exported, a, atol=1e-5)
    np.testing.assert_allclose(tuned.encode_text("a cup"), before.encode_text("a cup"), atol=1e-6)
