"""The examples of README.md run as written, in order, and have the documented results."""

import re

import numpy as np
import pages
import pytest
from places import ROOT

README = (ROOT / "README.md").read_text()


def blocks(section: str) -> list[tuple[str, str]]:
    """Returns (language, code) of each code block under a heading."""
    text = README.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```(python)?\n(.*?)```", text, re.S)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder with what the commands need of a clone, for them to write in."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "docs", "diva_jax"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_the_examples_run_as_written_and_in_their_order(clone, monkeypatch):
    monkeypatch.chdir(clone)
    scope = {}
    ((_, five_lines),) = blocks("Five lines")
    exec(five_lines, scope)  # noqa: S102
    assert (scope["images"] @ scope["texts"].T).shape == (1, 2)
    full_size, small, (_, in_open_clip) = blocks("Train, export, evaluate")
    assert [line.split()[2] for line in full_size[1].splitlines()] == ["diva_jax.main", "diva_jax.export_torch"]
    # The test is about the commands, so the run has few and small steps.
    few = " --config.steps=1 --config.condition.warmup_steps=1 --config.batch_size=8"
    outputs = [pages.shell(line + few * (".main " in line), clone) for line in small[1].strip().splitlines()]
    assert len(outputs) == 5 and (clone / "runs/small_eval/report.html").exists()
    assert "steps are done" in pages.shell(small[1].splitlines()[1] + few, clone)
    exec(in_open_clip, scope)  # noqa: S102
    import torch
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8))
    with torch.no_grad():
        features = scope["model"].encode_image(scope["preprocess"](image)[None])
    assert features.shape == (1, 64) and torch.isfinite(features).all()


def test_files_and_commands_that_the_readme_names_exist():
    for path in set(re.findall(r"\b(?:configs|docs|tests|diva_jax|tpu)/[\w/.]+\w", README)):
        assert (ROOT / path).exists(), path
    for module in set(re.findall(r"python -m diva_jax\.(\w+)", README)):
        assert (ROOT / "diva_jax" / f"{module}.py").exists() or (ROOT / "diva_jax" / module).is_dir(), module
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert f"\n{target}:" in makefile
