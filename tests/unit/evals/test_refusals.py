"""Data that a task cannot use is refused in one sentence that names the place, before any weights are loaded."""

import json
import os
import shutil
from pathlib import Path

import eval_data
import pytest
import trees
from helpers import refused
from specs import EVAL_CLIP

# Task, path of its data, its options, changes of good files, and what the sentence has; "$" is the folder of the files.
CASES = json.loads(Path(__file__).with_name("refused.json").read_text())
TARS = {f"tars/test/{i}.tar": {"0.cls": str(i), "0.png": "PNG"} for i in (0, 1)} | {"tars/classnames.txt": "a\nb\n"}
CHOICES = dict(natural="naturalbench", relation="vg_relation", attribution="vg_attribution", valse="existence")
CHOICES["whatsup"] = "controlled_images"


@pytest.fixture(scope="module")
def good(home):
    """Data of every task, and of every layout of choices."""
    eval_data.write_task_data(home)
    for folder, name in CHOICES.items():
        eval_data.write_choices(home / folder, name)
    trees.change(home, TARS)
    for task, data in (("zeroshot", "tars"), ("choice", "natural"), ("choice", "relation"), ("choice", "whatsup")):
        opened(task, home / data)
    return home


def opened(task, path, **options):
    partial = {"allow_partial": True} if task in ("choice", "judge", "robustness", "segmentation") else {}
    eval_data.prepared(task, path, **partial | options).bind(eval_data.eval_config(EVAL_CLIP, "x"), None)


@pytest.mark.parametrize("task, path, options, changes, says", CASES, ids=[case[-1][:40] for case in CASES])
def test_refused(good, tmp_path, task, path, options, changes, says):
    for there in good.iterdir():
        if any(name.startswith(f"{there.name}/") for name in changes):
            shutil.copytree(there, tmp_path / there.name, copy_function=os.link)
        else:
            (tmp_path / there.name).symlink_to(there)
    trees.change(tmp_path, changes)
    path, options = json.loads(json.dumps([path, options]).replace("$", str(tmp_path)))
    refused(says, opened, task, path, **options)
