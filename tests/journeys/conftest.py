"""What the journeys share: an empty folder, a tuned run, its evaluation on small data of every task, its exports."""

import json
from pathlib import Path

import commands
import eval_data
import pytest

# Steps and images are few, because the journeys are about what is written and read, not about what is learned.
SHORT = ("--config.steps=2", "--config.condition.warmup_steps=1", "--config.batch_size=8")
FORMATS = ("open_clip", "hf", "pt")


class Home:
    """A folder in which a user works; commands run there, with relative paths, as in the README.

    Attributes:
      folder: the folder.
      data: task -> the value of its --data, once it is written.
    """

    data: dict[str, str]

    def __init__(self, folder: Path):
        self.folder = folder

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def run(self, module: str, *args) -> str:
        """Returns the output of `python -m diva_jax.MODULE ARGS`, which must succeed."""
        return commands.succeed(module, *args, cwd=self.folder)

    def evaluate(self, data: dict[str, str], weights, out: str) -> str:
        """Evaluates weights on tasks, into the folder `out`; returns what the command printed."""
        quick = {"bootstrap": 100, "batch_size": 32, "mmvp.seeds": 2, "drift.neighbours": 3, "probe.neighbours": 3}
        quick |= {"probe.iterations": 20, "feedback.images": 4, "feedback.draws": 2, "judge.draws": 2}
        quick |= {f"{task}.allow_partial": True for task in ("choice", "judge", "robustness", "segmentation")}
        return self.run(
            "evaluate",
            "--config=world",
            *(f"--weights={w}" for w in weights),
            f"--task={','.join(data)}",
            *(f"--data={task}={path}" for task, path in data.items()),
            *(f"--config.eval.{field}={value}" for field, value in quick.items()),
            f"--out={out}",
        )

    def python(self, code: str) -> dict:
        """Runs lines of Python in a new process; returns the last line that it prints, which is JSON."""
        (self / "snippet.py").write_text(code)
        return json.loads(commands.succeed(self / "snippet.py", cwd=self.folder).splitlines()[-1])


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    return Home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def tuned(home):
    """Trains `runs/tuned` from the kept models of the world; returns what the command printed."""
    return home.run("main", "--config=world", "--workdir=runs/tuned", "--config.optim.lr=3e-3", *SHORT)


@pytest.fixture(scope="session")
def kept():
    """The folder of the CLIP that the runs begin with."""
    from diva_jax.world import models

    return models.WEIGHTS / models.CLIP


@pytest.fixture(scope="session")
def evaluated(home, tuned, kept):
    """Evaluates the kept CLIP and the tuned one on every task, into `results`; returns what the command printed."""
    home.data = eval_data.write_task_data(home / "data")
    return home.evaluate(home.data, (kept, "runs/tuned"), "results")


@pytest.fixture(scope="session")
def exported(home, evaluated):
    """Exports the run in every format, into the folder of the format's name; returns what the commands printed."""
    flags = ("--workdir=runs/tuned", "--results=results/results.json")
    return {f: home.run("export_torch", *flags, f"--out={f}", f"--format={f}") for f in FORMATS}
