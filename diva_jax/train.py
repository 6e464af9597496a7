"""The only train loop: build, restore, step, log, save."""

import json
import time
import zlib

import jax
import numpy as np
from etils import epath

from diva_jax import config as configs
from diva_jax import objectives
from diva_jax.common import paths
from diva_jax.common.errors import RunError
from diva_jax.common.log import say
from diva_jax.costs import chips
from diva_jax.data import pipeline
from diva_jax.evals import evaluator, results
from diva_jax.training import checkpoint, distributed, metrics, partition, sharding
from diva_jax.training.distributed import Preemption
from diva_jax.training.step import Program
from diva_jax.weights import parts


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


class Run:
    """One training run in a workdir.

    Args:
      config: of `config.default`'s form.
      workdir: where config.json, checkpoints, metrics.jsonl and TensorBoard events go; a folder, or gs://...

    Raises:
      UserError: anything about the input is wrong; nothing in the workdir is lost.
    """

    def __init__(self, config, workdir: epath.PathLike):
        self.config, self.workdir = config, paths.folder(workdir, "--workdir")
        configs.validate(config, jax.device_count())
        use_compile_cache(config.compile_cache, self.workdir)
        self.mesh = sharding.make_mesh(config.mesh)
        self.program = Program(config, self.mesh)
        self.batches = pipeline.build(
            config.data,
            seed=config.seed,
            global_batch=config.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            cache_dir=self.workdir / "cache",
        )
        self.total = self.program.stages[-1].end
        checkpoint.check_config(self.workdir, config)
        self.checkpoints = None
        self.step = checkpoint.latest_step(self.workdir) or 0
        self.evaluator = None if self.finished else evaluator.in_training(config, self.mesh)
        distributed.check_same(
            {
                "the number of images in config.data.path": self.batches.get_state()["records"],
                "the checksum of the config": zlib.crc32(config.to_json().encode()),
                "the last checkpoint in --workdir": self.step,
            }
        )

    @property
    def finished(self) -> bool:
        return self.step >= self.total

    def _load(self) -> None:
        """Frozen weights from their sources; the state from the last checkpoint, or from the sources too."""
        program, pretrained = self.program, objectives.find(self.config.objective).PRETRAINED
        latest = checkpoint.latest_step(self.workdir)
        began = time.perf_counter()
        names = None if latest is None else program.abstract_frozen()
        arrays, self.origins = parts.load(program, pretrained, names)
        # Only now, when every input has been found good, is anything written.
        if jax.process_index() == 0:
            checkpoint.write_config(self.workdir, self.config)
        distributed.check_same({f"the checksum of the {part} weights": o["sha256"] for part, o in self.origins.items()})
        distributed.check_same({"config.json in --workdir": checkpoint.seen_config(self.workdir)})
        saving = self.config.checkpoint
        self.checkpoints = checkpoint.Checkpoints(self.workdir, saving.keep, saving.timeout)
        if latest is None:
            self.state = program.init_state(arrays)
        else:
            abstract = program.abstract_state(program.stage_at(latest))
            self.state, data_state, meta = self.checkpoints.restore(latest, abstract)
            checkpoint.check_sources(meta["sources"], self.origins)
            self.batches.set_state(data_state)
        self.frozen = {n: arrays[n] for n in program.abstract_frozen()}
        say(f"weights loaded in {time.perf_counter() - began:.1f} s")
        say(partition.summary(program.arrays, program.trained))
        if latest is not None:
            say(f"goes on from the checkpoint of step {latest}")

    def _evaluate(self) -> None:
        """Scores of the weights as they are, where `config.eval` asks for them; training notices nothing of it."""
        every = self.config.eval.every
        if not self.evaluator or (self.step % every and self.step != self.total):
            return
        self.progress.flush()
        began = time.perf_counter()
        row, notes = self.evaluator.scalars({**self.frozen, **self.state["params"]})
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
        meta = {"sources": self.origins, "config": json.loads(self.config.to_json())}
        self.checkpoints.save(self.step, self.state, self.batches.get_state(), meta, wait)

    def run(self) -> bool:
        """Trains to the end, or to SIGTERM; saves in both cases.

        Returns:
          True where the run is finished.

        Raises:
          RunError: loss or gradient not finite, too many broken images, a checkpoint that cannot be written,
            another process lost; the last checkpoint stands.
        """
        if self.finished:
            return True
        with distributed.explained(lambda: self.step):
            self._load()
        c = self.config
        tensorboard, first = c.log.tensorboard, jax.process_index() == 0
        self.writer = writer = metrics.Writer(self.workdir, self.step, tensorboard) if first else None
        peak = chips.peak(self.mesh.devices.flat[0])
        counted = getattr(objectives.find(c.objective), "flops_per_image", None)
        utilisation = counted(c) / (peak * self.mesh.size) if peak and counted else None
        self.progress = metrics.Progress(writer, self.step, self.total, c.log.every, c.batch_size, utilisation)
        self.profile = Profile(c.profile, self.workdir)
        preempted = Preemption()
        try:
            with distributed.explained(lambda: self.step):
                if self.step == 0:
                    self._evaluate()
                while not self.finished and not preempted:
                    self._run_stage(self.program.stage_at(self.step), preempted)
                self.progress.flush()
                self._save(wait=True)
        except distributed.Lost:
            self.checkpoints.abandon()
            raise
        except OSError as e:
            raise RunError(
                f"step {self.step}: {e}: see that there is room in {self.workdir} and that it may be written, then "
                "start again; the last checkpoint stands"
            ) from e
        finally:
            preempted.close()
            self.profile.close()
            self.batches.close()
            self.checkpoints.close()
            if writer:
                writer.close()
        if self.finished and jax.process_index() == 0:
            (self.workdir / "done").touch()  # For scripts that start the command again until the run is done.
        if not self.finished:
            say(f"SIGTERM: saved step {self.step}; the same command goes on from here")
        return self.finished

    def _run_stage(self, index: int, preempted: Preemption) -> None:
        """Steps until the stage's end or SIGTERM; leaves the next stage's optimizer state behind."""
        stage = self.program.stages[index]
        step_fn = self.program.step(index)
        say(f"stage {stage.name}: steps {stage.start} to {stage.end}, peak learning rate {stage.lr:g}; compiling")
        while self.step < stage.end and not preempted:
            self.profile.before(self.step)
            began = time.perf_counter()
            batch = next(self.batches)
            self.progress.waited(time.perf_counter() - began, self.batches.broken.count)
            self.state, values = step_fn(self.state, self.frozen, to_device(batch, self.program.batch_sharding))
            self.step += 1
            preempted.after(self.step)
            self.progress.add(self.step, values)
            if self.step == stage.end and index + 1 < len(self.program.stages):
                self.state["opt"] = self.program.init_opt(index + 1, self.state["params"])
            if not preempted:
                self._evaluate()
            if self.step % self.config.checkpoint.every == 0:
                self.progress.flush()
                self._save()
