"""Optimizer steps over the stages of a program: what every train loop does between two batches."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from diva_jax.common import log
from diva_jax.common.log import say
from diva_jax.training import compiler, partition
from diva_jax.training.step import Program


def to_device(batch: dict[str, np.ndarray], shardings: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """Returns a batch as global arrays; each process provides its own rows."""
    return {k: jax.make_array_from_process_local_data(shardings, v) for k, v in batch.items()}


class Steps:
    """The step of each stage of a program, compiled at its first batch; `on_compiled` gets the seconds that each
    compilation took.

    Several runs can share them: the config may change between them in what no compiled step depends on (seed, data,
    steps).
    """

    def __init__(self, program: Program, on_compiled: Callable[[float], None] = lambda seconds: None):
        self.program, self._on_compiled = program, on_compiled
        self._compiled: dict[int, tuple[jax.stages.Compiled, Any]] = {}

    def __call__(self, index: int, state: dict, frozen: dict, batch: dict) -> tuple[dict, dict]:
        """Makes one step of stage `index`; the state is donated. Returns (state, metrics)."""
        if index not in self._compiled:
            say(self._describe(index))
            step = self.program.step(index)
            began = time.perf_counter()
            with log.waiting("compiling"):
                program = compiler.compiled(step.lower(state, frozen, batch))
            self._compiled[index] = program, step.pace
            say(f"compiled in {time.perf_counter() - began:.0f} s")
            self._on_compiled(time.perf_counter() - began)
        program, pace = self._compiled[index]
        return program(state, frozen, batch, pace)

    def _describe(self, index: int) -> str:
        """What a stage trains, as a table and a sentence."""
        arrays, active, stage = self.program.arrays, self.program.active(index), self.program.stages[index]
        count, where = sum(arrays[n].size for n in active), dict.fromkeys(n.split("/")[0] for n in active)
        return (
            f"{partition.summary(arrays, active)}\n"
            f"stage {stage.name}: steps {stage.start} to {stage.end}, peak learning rate {stage.lr:g}, trains "
            f"{count:,} parameters of {', '.join(where)}; compiling"
        )


def train_steps(
    steps: Steps,
    state: dict,
    frozen: dict[str, jax.Array],
    next_batch: Callable[[], dict[str, np.ndarray] | None],
    start: int,
    end: int,
) -> Iterator[tuple[int, dict, dict[str, jax.Array]]]:
    """Makes the steps from `start` to `end`; yields (completed steps, state, metrics) after each.

    The state, see `step.train_step`, is donated to the next step. `next_batch` returns this process's rows of a batch;
    None ends the training. A stage that follows another one begins with a new optimizer. A UserError where the compiler
    refuses `config.compiler_options`.
    """
    program = steps.program
    for step in range(start, end):
        index = program.stage_at(step)
        if (batch := next_batch()) is None:
            return
        state, values = steps(index, state, frozen, to_device(batch, program.batch_sharding))
        if step + 1 == program.stages[index].end and index + 1 < len(program.stages):
            state["opt"] = program.init_opt(index + 1, state["params"])
        yield step + 1, state, values
