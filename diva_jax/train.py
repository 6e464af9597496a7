"""The only train loop: build, restore, step, log, evaluate, save."""

import contextlib
import dataclasses
import json
import time
import zlib

import jax
import numpy as np
from etils import epath

from diva_jax import config as configs
from diva_jax.common import paths
from diva_jax.common.errors import RunError
from diva_jax.common.log import say
from diva_jax.costs import chips
from diva_jax.data import pipeline
from diva_jax.evals import evaluator, results
from diva_jax.training import checkpoint, distributed, load, metrics, partition, sharding, workdirs
from diva_jax.training.distributed import Preemption
from diva_jax.training.step import Program


def to_device(batch: dict[str, np.ndarray], shardings: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """This process's rows of a batch -> global arrays."""
    return {k: jax.make_array_from_process_local_data(shardings, v) for k, v in batch.items()}


def use_compile_cache(setting: str, workdir: epath.Path) -> None:
    """Keeps compiled programs where `config.compile_cache` says, so that a second start need not compile."""
    if setting:
        folder = workdir / "cache" / "compiled" if setting == "auto" else epath.Path(setting).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(paths.absolute(folder)))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


class Profile:
    """Traces `config.profile.steps` steps from `config.profile.start` on into WORKDIR/profile."""

    def __init__(self, config, workdir: epath.Path):
        self._start, self._end = config.start, config.start + config.steps
        self._folder, self._mirror = workdir / "profile", None

    def before(self, step: int) -> None:
        """Called before each step with the number of steps done."""
        if not self._mirror and self._start <= step < self._end:
            self._mirror = paths.Mirror(self._folder)
            jax.profiler.start_trace(str(self._mirror.local))
        elif self._mirror and step >= self._end:
            self.close()

    def close(self) -> None:
        if self._mirror:
            jax.profiler.stop_trace()
            self._mirror.close()
            self._mirror = None
            say(f"profile of the steps from {self._start} on: {self._folder}")


@dataclasses.dataclass
class Loaded:
    """The arrays of a run as it starts or resumes.

    Attributes:
      state: the train state.
      frozen: name -> array that no stage trains.
      origins: prefix -> {"source", "sha256"} of the weights that the run began with.
      checkpoints: of its workdir.
      parent: record of the checkpoint that it began with, see `workdirs.Parent.record`; None where there is none.
    """

    state: dict
    frozen: dict[str, jax.Array]
    origins: dict[str, dict]
    checkpoints: checkpoint.Checkpoints
    parent: dict | None


class Run:
    """One training run in a workdir, checked and ready to load its weights.

    Args:
      config: of `config.default`'s form.
      workdir: where config.json, checkpoints, metrics.jsonl and TensorBoard events go; a folder, or gs://...
      init_from: WORKDIR or WORKDIR:STEP of another run, from which parameters of the same name and shape are taken
        instead of from their sources. A run that resumes does not read it.

    Raises:
      UserError: anything about the input is wrong; nothing in the workdir is changed.
    """

    def __init__(self, config, workdir: epath.PathLike, init_from: str | None = None):
        self.config, self.workdir = config, paths.folder(workdir, "--workdir")
        configs.validate(config, jax.device_count())
        use_compile_cache(config.compile_cache, self.workdir)
        self.mesh = sharding.make_mesh(config.mesh)
        self.program = Program(config, self.mesh)
        self.program.towers  # noqa: B018 - an objective whose towers cannot be exported is refused before it trains.
        self.start = checkpoint.latest_step(self.workdir) or 0
        self.parent = workdirs.Parent.open(init_from) if init_from and not self.start else None
        self.taken = self.parent.matching(self.program.arrays) if self.parent else []
        self.batches = pipeline.open_batches(
            config.data,
            self.program.objective.inputs,
            seed=config.seed,
            global_batch=config.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            cache_dir=self.workdir / "cache",
        )
        self.total = self.program.stages[-1].end
        workdirs.check_config(self.workdir, config)
        self.evaluator = None if self.finished else evaluator.in_training(config, self.mesh)
        distributed.check_same(
            {
                "the number of images in config.data.path": self.batches.get_state()["records"],
                "the checksum of the config": zlib.crc32(config.to_json().encode()),
                "the last checkpoint in --workdir": self.start,
                "the checkpoint of --init_from": self.parent.sha256 if self.parent else None,
            }
        )

    @property
    def finished(self) -> bool:
        """Whether all steps were done when this run was opened."""
        return self.start >= self.total

    def load(self) -> Loaded:
        """Frozen weights from their sources; the state from the last checkpoint, or from the sources too.

        What is taken from another run's checkpoint, frozen or not, is not read from its source.
        """
        program, resumes, saving = self.program, self.start > 0, self.config.checkpoint
        began = time.perf_counter()
        checkpoints = checkpoint.Checkpoints(self.workdir, saving.keep, saving.timeout) if resumes else None
        parent, taken = self.parent, self.taken
        record = checkpoints.meta(self.start).get("init_from") if resumes else None
        if record and record["frozen"]:
            parent, taken = workdirs.Parent.recorded(record), record["frozen"]
        elif parent:
            record = parent.record(set(taken) & set(program.abstract_frozen()))
        wanted = set(program.abstract_frozen() if resumes else program.arrays)
        arrays, origins = load.initial_arrays(program, wanted - set(taken))
        if taken:
            arrays |= parent.read({n: program.arrays[n] for n in taken})
        # Only now, when every input has been found good, is anything written.
        if jax.process_index() == 0:
            workdirs.write_config(self.workdir, self.config)
        distributed.check_same({f"the checksum of the {part} weights": o["sha256"] for part, o in origins.items()})
        distributed.check_same({"config.json in --workdir": workdirs.seen_config(self.workdir)})
        checkpoints = checkpoints or checkpoint.Checkpoints(self.workdir, saving.keep, saving.timeout)
        if resumes:
            abstract = program.abstract_state(program.stage_at(self.start))
            state, data_state, meta = checkpoints.restore(self.start, abstract)
            workdirs.check_sources(meta["sources"], origins)
            self.batches.set_state(data_state)
        else:
            state = program.init_state(arrays)
        say(f"weights loaded in {time.perf_counter() - began:.1f} s")
        say(partition.summary(program.arrays, program.trained))
        if self.parent:
            say(
                f"{len(taken)} of {len(program.arrays)} parameters are those of --init_from={parent.workdir}, step "
                f"{parent.step}, which has {len(parent.shapes)}; all others begin as without it"
            )
        if program.objective.compares_images and self.config.accum > 1:
            together = self.config.batch_size // self.config.accum
            say(
                f"config.objective={self.config.objective} compares the images of a micro-batch with each other: "
                f"{together} at once, not the {self.config.batch_size} of a step (config.accum={self.config.accum})"
            )
        if resumes:
            say(f"resumed from the checkpoint of step {self.start}")
        return Loaded(state, {n: arrays[n] for n in program.abstract_frozen()}, origins, checkpoints, record)

    def run(self) -> bool:
        """Trains to the end, or to SIGTERM; saves in both cases.

        Returns:
          True where the run is finished.

        Raises:
          UserError: weights are missing, broken, or of another architecture.
          RunError: loss or gradient not finite, too many broken images, a checkpoint that cannot be written,
            another process lost; the last checkpoint is kept.
        """
        if self.finished:
            return True
        with contextlib.closing(self.batches):
            return _Loop(self).run()


class _Loop:
    """A run with its weights, from its first step to its last."""

    def __init__(self, run: Run):
        self.run_, self.program, self.step = run, run.program, run.start
        c, first = run.config, jax.process_index() == 0
        with distributed.explained(lambda: self.step):
            self.loaded = run.load()
        self.state, self.checkpoints = self.loaded.state, self.loaded.checkpoints
        self.writer = metrics.Writer(run.workdir, self.step, c.log.tensorboard) if first else None
        peak, flops = chips.peak(run.mesh.devices.flat[0]), run.program.objective.flops()
        utilisation = flops / (peak * run.mesh.size) if peak and flops else None
        self.progress = metrics.Progress(self.writer, self.step, run.total, c.log.every, c.batch_size, utilisation)
        self.profile, self.preempted = Profile(c.profile, run.workdir), Preemption()

    def run(self) -> bool:
        """See `Run.run`."""
        run, finished = self.run_, False
        try:
            with distributed.explained(lambda: self.step):
                if self.step == 0:
                    self._evaluate()
                while self.step < run.total and not self.preempted:
                    self._run_stage(self.program.stage_at(self.step))
                self.progress.flush()
                self._save(wait=True)
                finished = self.step >= run.total
        except distributed.Lost:
            self.checkpoints.abandon()
            raise
        except OSError as e:
            raise RunError(
                f"step {self.step}: {e}: see that there is room in {run.workdir} and that it may be written, then "
                "start again; the last checkpoint is kept"
            ) from e
        finally:
            self.preempted.close()
            self.profile.close()
            self.checkpoints.close()
            if self.writer:
                self.writer.close()
        if finished and jax.process_index() == 0:
            (run.workdir / "done").touch()  # For scripts that start the command again until the run is done.
        if not finished:
            say(f"SIGTERM: saved step {self.step}; the same command resumes from here")
        return finished

    def _evaluate(self) -> None:
        """Scores of the present weights, where `config.eval` asks for them; does not affect training."""
        run = self.run_
        if not run.evaluator or (self.step % run.config.eval.every and self.step != run.total):
            return
        self.progress.flush()
        began = time.perf_counter()
        params = {**self.loaded.frozen, **self.state["params"]}
        row, notes = run.evaluator.scalars(self.program.towers(params), params)
        took = time.perf_counter() - began
        if self.writer:
            self.writer.write(self.step, row)
        say(f"evaluated step {self.step} in {took:.0f} s: {results.summary(row)}")
        for note in notes:
            say(f"  {note}")
        self.progress.paused(took)

    def _save(self, wait: bool = False) -> None:
        if self.writer:
            self.writer.flush()
        meta = {"sources": self.loaded.origins, "config": json.loads(self.run_.config.to_json())}
        if self.loaded.parent:
            meta["init_from"] = self.loaded.parent
        self.checkpoints.save(self.step, self.state, self.run_.batches.get_state(), meta, wait)

    def _run_stage(self, index: int) -> None:
        """Steps until the stage's end or SIGTERM; leaves the next stage's optimizer state behind."""
        run, stage = self.run_, self.program.stages[index]
        step_fn = self.program.step(index)
        say(f"stage {stage.name}: steps {stage.start} to {stage.end}, peak learning rate {stage.lr:g}; compiling")
        while self.step < stage.end and not self.preempted:
            self.profile.before(self.step)
            began = time.perf_counter()
            batch = next(run.batches)
            self.progress.waited(time.perf_counter() - began, run.batches.broken.count)
            batch = to_device(batch, self.program.batch_sharding)
            self.state, values = step_fn(self.state, self.loaded.frozen, batch)
            self.step += 1
            self.preempted.after(self.step)
            self.progress.add(self.step, values)
            if self.step == stage.end and index + 1 < len(self.program.stages):
                self.state["opt"] = self.program.init_opt(index + 1, self.state["params"])
            if not self.preempted:
                self._evaluate()
            if self.step % run.config.checkpoint.every == 0:
                self.progress.flush()
                self._save()
