"""A run that is given more steps: what is allowed, and what it says about the learning rate."""

import re

import pytest
import small

from diva_jax.common.errors import UserError
from diva_jax.training import checkpoint, optim, workdirs


def config(**fields):
    return small.small_config(**{"steps": 10, "condition__warmup_steps": 3} | fields)


@pytest.fixture(scope="module")
def programs():
    """Of ten steps, and of 25."""
    return small.program(config()), small.program(config(steps=25))


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A workdir of `config()` whose last checkpoint is that of its last step."""
    workdirs.write_config(tmp_path, config())
    monkeypatch.setattr(checkpoint, "latest_step", lambda _: 13)
    return tmp_path


def test_more_steps_and_nothing_else_extend_a_run(workdir):
    assert workdirs.check_config(workdir, config()) is None
    assert workdirs.check_config(workdir, config(steps=25)) == 10
    assert workdirs.check_config(workdir, config(steps=25, log__every=3, data__threads=2, checkpoint__keep=9)) == 10
    with pytest.raises(UserError, match=r"steps \(10 there, 9 here\)"):
        workdirs.check_config(workdir, config(steps=9))
    with pytest.raises(UserError, match=r"another config: diva.draws \(.*\), optim.lr \(0.01 there, 0.5 here\); use"):
        workdirs.check_config(workdir, config(steps=25, optim__lr=0.5, diva__draws=3))


@pytest.mark.parametrize("start", [2, 8, 13])
def test_what_becomes_of_the_learning_rate(programs, start):
    """Both rates are of the same step: before the last stage of its first one, after the end of its last one."""
    short, long = programs
    said = workdirs.extension(long, start, 10)
    assert "config.steps was 10 and is 25: the stage tune has the schedule of its 25 steps" in said
    now, before = (float(n) for n in re.findall(r"is ([\d.e-]+), where that of 10 steps has ([\d.e-]+)", said)[0])
    stage = max(start, 3) - 3
    assert now == pytest.approx(float(long.learning_rate(1)(stage)), rel=1e-2)
    assert before == pytest.approx(float(short.learning_rate(1)(min(stage, 9))), rel=1e-2)
    assert workdirs.extension(long, start, 25) == ""


def test_the_optimizer_state_does_not_depend_on_the_schedule(programs):
    """Checkpoints of any number of steps are of the same form."""
    shapes = [p.abstract_state(1) for p in programs]
    assert shapes[0] == shapes[1]
    numbers = [optim.pace(p.stages[1], 0.2) for p in programs]
    assert [int(n.warm) for n in numbers] == [2, 5]
