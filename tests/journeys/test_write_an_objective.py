"""docs/WRITE_AN_OBJECTIVE.md, walked from the module to a loop of one's own; what its module may do wrong."""

import json
import re
import sys
from pathlib import Path

import commands
import numpy as np
import pytest
import trees

PAGE = "docs/WRITE_AN_OBJECTIVE.md"
FEW = " --config.steps=2 --config.batch_size=8"


@pytest.fixture(scope="module")
def folder(home):
    module, config = (code for language, code in commands.blocks(PAGE)[:2])
    trees.change(home, {"mine/rotations.py": module, "rotations.py": config})
    return home


def test_the_page_runs_as_it_stands(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    (_, lines), (_, compared), (_, test), (_, loop) = commands.blocks(PAGE)[2:]
    for line in lines.strip().splitlines():
        commands.shell(line + FEW * (".main " in line), folder)
    for name in [n for n in sys.modules if n == "mine" or n.startswith("mine.")]:
        sys.modules.pop(name)
    scope = {}
    exec(compared, scope)  # noqa: S102
    (task,) = json.loads((folder / "runs/compared/results.json").read_text())["tasks"].values()
    assert [(c["before"], c["after"]) for c in task["comparisons"]][-1] == ("control:2", "tuned:2")
    exec(test, scope)  # noqa: S102
    scope["test_the_tower_gets_a_gradient_and_rows_are_independent"]()
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    scope |= {"images": images, "batch": {"image": images, "row": np.arange(8, dtype=np.int32)}}
    exec(loop, scope)  # noqa: S102
    assert scope["cosine"].shape == (8,) and 0.1 < scope["cosine"].min() < 0.9999999
    import diva_jax

    exported = diva_jax.load("exports/mine").encode_image(images)
    np.testing.assert_array_equal(exported, scope["after"].encode_image(images))


# A change of the module's text, the exit code, and what the command says, with the line of the module.
BROKEN = json.loads(Path(__file__).with_name("broken.json").read_text())


def test_an_error_inside_names_its_line(folder):
    text = (folder / "mine/rotations.py").read_text()
    for i, (old, new, want, says) in enumerate(BROKEN.values()):
        assert text.count(old) == 1
        config = (folder / "rotations.py").read_text().replace("mine.rotations", f"broken{i}.rotations")
        trees.change(folder, {f"broken{i}/rotations.py": text.replace(old, new), f"config{i}.py": config})
        line = (f"--config=config{i}.py", f"--workdir=broken{i}/run", *FEW.split(), "--config.compile_cache=")
        code, out, err = commands.run("main", *line, cwd=folder)
        last = err.splitlines()[-1]
        assert code == want and says in last, (list(BROKEN)[i], code, out, err)
        assert re.search(rf"broken{i}/rotations.py:\d+\b", last) and "please report" not in last, last
