"""The commands in the README's laptop section run as written, in order, and have the documented results."""

import os
import re
import sys
from pathlib import Path

import commands
import numpy as np
import pytest
from places import ROOT

README = (ROOT / "README.md").read_text()


def blocks(section: str) -> list[str]:
    """Returns the code blocks under a heading."""
    text = README.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```(?:python)?\n(.*?)```", text, re.S)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A folder with the repository's configs, as after a clone, for the commands to write in."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "configs").symlink_to(ROOT / "configs")
    bin_ = folder / "bin"
    bin_.mkdir()
    (bin_ / "python").symlink_to(sys.executable)
    return folder


def run(command: str, folder: Path) -> str:
    command = command.replace("python ", f"{sys.executable} ", 1)
    first = f"{folder / 'bin'}:{os.environ['PATH']}"
    return commands.output(commands.launch("bash", "-c", command, cwd=folder, PATH=first))


def test_laptop_commands_run_as_written(elsewhere):
    code = [b for b in blocks("Try it on a laptop") if b.startswith("python -m")]
    lines = [line for b in code for line in b.strip().splitlines()]
    assert len(lines) == 4
    # Few and small steps, because this is about the commands.
    few = " --config.steps=1 --config.condition.warmup_steps=1 --config.batch_size=8"
    for line in lines[:3]:
        run(line + few * (".main " in line), elsewhere)
    assert "done" in run(lines[1] + few, elsewhere)
    run(lines[3] + few, elsewhere)
    run(blocks("Use what was trained")[0].strip(), elsewhere)
    assert (elsewhere / "runs/hf/config.json").exists()
    (python,) = (b for b in blocks("Try it on a laptop") if b.startswith("import open_clip"))
    before = os.getcwd()
    os.chdir(elsewhere)
    try:
        scope = {}
        exec(python, scope)  # noqa: S102
    finally:
        os.chdir(before)
    import torch
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8))
    with torch.no_grad():
        features = scope["model"].encode_image(scope["preprocess"](picture)[None])
    assert features.shape == (1, 64) and torch.isfinite(features).all()


def test_files_and_commands_that_the_readme_names_exist():
    for path in set(re.findall(r"\b(?:configs|docs|tests|diva_jax|tpu)/[\w/.]+\w", README)):
        assert (ROOT / path).exists(), path
    for module in set(re.findall(r"python -m diva_jax\.(\w+)", README)):
        assert (ROOT / "diva_jax" / f"{module}.py").exists() or (ROOT / "diva_jax" / module).is_dir(), module
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert f"\n{target}:" in makefile
