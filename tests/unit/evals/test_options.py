"""The section `config.eval`: defaults, errors, and tasks outside of the package."""

import dataclasses
import importlib
import sys

import pytest
from eval_data import eval_config
from helpers import refused
from ml_collections import ConfigDict
from specs import EVAL_CLIP as CLIP

from diva_jax import config, evals
from diva_jax.common.errors import UserError
from diva_jax.evals import Settings, encode, evaluator
from diva_jax.training import partition

TASKS = ["choice", "drift", "feedback", "judge", "mmvp", "probe", "retrieval", "robustness", "segmentation", "zeroshot"]
OUTSIDE = """
import dataclasses
from ml_collections import ConfigDict
from diva_jax.evals import Outcome, Task

RULES = (("scale", lambda x: x > 0, "must be above 0"),)

@dataclasses.dataclass(frozen=True)
class Options:
    scale: float = 2.0

def default():
    return ConfigDict(dataclasses.asdict(Options()))

class Length(Task):
    title, items, count = "Length", "letters", 1
    metrics = {"length": {"title": "length", "unit": ""}}

    def __init__(self, path, options, settings):
        self.data, self.options, self.settings = path, options, settings

    def evaluate(self, model):
        score = self.options.scale * len(self.data)
        return Outcome({"scores": {"length": {"score": score, "interval": None}}}, [], {"score": score})

    def compare(self, before, after):
        difference = after.held["score"] - before.held["score"]
        return {"scores": {"length": {"difference": difference, "interval": None, "mcnemar": None}}}

def prepare(path, section, settings):
    return Length(path, Options(**section), settings)
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A package with the task `outside_tasks.length`, and modules that are not tasks."""
    package = tmp_path / "outside_tasks"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for name in ("length", "data", "mmvp"):
        (package / f"{name}.py").write_text(OUTSIDE)
    (package / "empty.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield "outside_tasks.length"
    for name in [n for n in sys.modules if n.startswith("outside_tasks")]:
        del sys.modules[name]


def changed(**fields) -> ConfigDict:
    """The default section with other values, by name; dots as double underscores."""
    section = evals.default()
    for name, value in fields.items():
        *path, leaf = name.split("__")
        node = section
        for part in path:
            node = node[part]
        node[leaf] = value
    return section


def test_defaults():
    """The default of each option is asserted by the checks of docs/CONFIG.md, which lists them."""
    c = config.default().eval.to_dict()
    assert set(c) == {f.name for f in dataclasses.fields(Settings)} | set(TASKS) - {"retrieval"}
    assert evals.names() == TASKS
    settings, own = evals.parse(evals.default(), TASKS)
    assert settings == Settings() and list(own) == TASKS
    assert own["feedback"].to_dict() == c["feedback"] and not own["retrieval"]


def test_other_bad_values_are_refused():
    refused("config.eval.dtype='float16' must be float32 or bfloat16", evals.parse, changed(dtype="float16"))
    refused("config.eval.every=-1 must be at least 0", evals.parse, changed(every=-1, data=("drift=x",)))
    for changes in (dict(every=3), dict(data=("drift=x",))):
        with pytest.raises(UserError, match="set both, every to at least 1 and data to texts TASK=PATH, or neither"):
            evals.parse(changed(**changes))
    for entry in ("drift", "drift=", "=x"):
        refused(f"config.eval.data has '{entry}', which is not TASK=PATH", evals.parse, changed(every=3, data=(entry,)))
    for name in ("stats", "nothing"):
        refused(f"the task {name} is not known: use choice, drift, .*mmvp", evals.find, name)
        refused(f"the task {name} is not known", evals.parse, changed(every=3, data=(f"{name}=x",)))


@pytest.mark.parametrize("field", ["images", "mmvp__draws", "my_task"])
def test_unknown_fields_are_refused(field):
    refused(f"the config has no field eval.{field.replace('__', '[.]')}", evals.parse, changed(**{field: 3}))
    c = config.default()
    with c.unlocked():
        c.eval = changed(**{field: 3})
    refused("the config has no field eval.", config.validate, c, 1)


def test_a_task_from_outside_the_package(outside, tmp_path):
    c = eval_config(CLIP, tmp_path)
    mesh = partition.make_mesh(c.mesh)
    c.eval.update(every=2, data=(f"{outside}=four",), seed=7)
    config.validate(c, 1)
    task = evaluator.Evaluator(c, mesh, {outside: "four"}).tasks["length"]
    assert task.options.scale == 2.0 and task.settings.seed == 7  # No section: the defaults.
    with c.unlocked():
        c.eval.length = evals.find(outside).default()
    c.eval.length.scale = 3.0
    config.validate(c, 1)
    run = evaluator.in_training(c, mesh)
    assert run.options["length"] == {"scale": 3.0} and "every" not in run.options and "mmvp" not in run.options
    outcomes = run.evaluate(run.model("x", encode.Encoder({}, None, "", {}, "")))
    tasks, rows = run.report([("x", outcomes), ("y", outcomes)])
    assert tasks["length"]["weights"]["x"]["scores"]["length"]["score"] == 12 and rows == []
    assert tasks["length"]["comparisons"][0]["scores"]["length"]["difference"] == 0
    c.eval.length.scale = 0.0
    refused("config.eval.length.scale=0.0 must be above 0", evaluator.Evaluator, c, mesh, {outside: "four"})


def test_modules_that_cannot_be_tasks_are_refused(outside):
    for name, says in (
        ("outside_tasks.none", "--task=.outside_tasks.none. cannot be imported .*PYTHONPATH"),
        ("outside_tasks.empty", "the module outside_tasks.empty is not a task, it lacks prepare"),
        ("outside_tasks.data", "config.eval has another 'data', rename the module"),
        ("outside_tasks.mmvp", "config.eval has another 'mmvp', rename the module"),
    ):
        with pytest.raises(UserError, match=says):
            evals.parse(evals.default(), [name])
