"""A training run in a workdir: build, restore, step, log, evaluate, save."""

import contextlib
import importlib.util
import json
import signal
import time
import zlib

import jax
import numpy as np
from etils import epath

from diva_jax import config as configs, evals
from diva_jax.common import paths
from diva_jax.common.errors import RunError, UserError
from diva_jax.common.log import say
from diva_jax.costs import chips
from diva_jax.data import pipeline
from diva_jax.evals import evaluator, results
from diva_jax.training import cache_builder, checkpoint, compiler, distributed, lock, metrics, partition, workdirs
from diva_jax.training.step import Program, Steps, averaged, train_steps

_MANY_EPOCHS = 5.0  # The published runs see each image about once.


class Profile:
    """Records a trace of `config.profile.steps` steps, beginning at `config.profile.start`, in WORKDIR/profile."""

    def __init__(self, config, workdir: epath.Path):
        self._start, self._end = config.start, config.start + config.steps
        self._folder, self._mirror = workdir / "profile", None

    def before(self, step: int) -> None:
        """Must be called before each step, with the number of completed steps."""
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
    """One training run of a config, as `config.default` returns it, in a workdir for config.json, checkpoints,
    metrics.jsonl and TensorBoard events, a path or gs://..., checked and ready to load its weights. `init_from`:
    WORKDIR or WORKDIR:STEP of another run, from which parameters of the same name and shape are taken instead of from
    their sources; a run that resumes does not read it. `saved`: a folder of the user's own, of executables that `python
    -m diva_jax.aot --save` wrote. A UserError, before the workdir is changed, where something given is invalid."""

    def __init__(self, config, workdir: epath.PathLike, init_from: str | None = None, saved: str | None = None):
        self.config, self.workdir, self.init_from = config, paths.folder(workdir, "--workdir"), init_from
        paths.check_writable(self.workdir, "--workdir")
        configs.validate(config, jax.device_count())
        if config.log.wandb and importlib.util.find_spec("wandb") is None:
            raise UserError(f"config.log.wandb={config.log.wandb!r} needs the package wandb: pip install -e '.[wandb]'")
        self.saved = compiler.saved_in(saved) if saved else None
        compiler.use_cache(config.compile_cache, self.workdir)
        self.mesh = partition.make_mesh(config.mesh)
        self.program = Program(config, self.mesh, self.workdir)
        self.program.check_exportable()
        self.start = checkpoint.latest_step(self.workdir) or 0
        if not self.start:
            configs.check_used(config, self.program.trained)
        self.parent = workdirs.Parent.open(init_from) if init_from and not self.start else None
        self.taken = self.parent.matching(self.program.arrays) if self.parent else []
        self.batches = pipeline.Batches(
            config.data,
            self.program.objective.inputs,
            seed=config.seed,
            global_batch=config.batch_size,
            rows=partition.rows_here(self.mesh, config.batch_size),
            cache_dir=self.workdir / "cache",
            cache=cache_builder.open_cache(self.program),
        )
        self.total = self.program.stages[-1].end
        self.steps_before = workdirs.check_config(self.workdir, config)
        self.lock: lock.Lock | None = None
        self.stopped_by: signal.Signals | None = None
        self.evaluator, self.evaluation_due = None, False
        if config.eval.every and not self.finished:
            data = evals.entries(config.eval.data, "config.eval.data")
            self.evaluator = evaluator.Evaluator(config, self.mesh, data, self.workdir)
        distributed.check_same(
            {
                "the number of images in config.data.path": self.batches.get_state()["records"],
                "the fingerprint of config.data.latents": self.batches.get_state().get("latents"),
                "the checksum of the config": zlib.crc32(config.to_json().encode()),
                "the last checkpoint in --workdir": self.start,
                "the checkpoint of --init_from": self.parent.sha256 if self.parent else None,
            }
        )

    @property
    def finished(self) -> bool:
        """Whether all steps, and the evaluation after the last, were completed when this run was opened."""
        return self.start >= self.total and (self.workdir / "done").exists()

    def describe(self) -> str:
        """The header of a run: its data, devices, dtypes, sources, and where it writes."""
        c, objective = self.config, self.program.objective
        images, shape = self.batches.get_state()["records"], self.mesh.shape
        epochs = self.total * c.batch_size / images
        kind = self.mesh.devices.flat[0].device_kind
        lines = [
            f"{c.objective}: {self.total:,} steps x {c.batch_size:,} images = {epochs:.3g} epochs of the {images:,} "
            f"images in {paths.without_secrets(c.data.path)}",
            f"{self.mesh.size} x {kind}, mesh data {shape['data']} x fsdp {shape['fsdp']}; computes in {c.dtype}, "
            f"frozen weights in {c.frozen_dtype}",
            *(f"{prefix} from {part.source}" for prefix, part in objective.pretrained().items()),
            *([f"latents from {c.data.latents}"] if c.data.latents else []),
            f"writes to {self.workdir}",
        ]
        sourced = {prefix.partition("/")[0] for prefix in objective.pretrained()}
        if "vision" not in sourced and any(name.startswith("vision/") for name in self.program.arrays):
            lines.append("note: vision begins with random weights, as pretrained() names no source for it")
        if epochs > _MANY_EPOCHS:
            lines.append(f"note: every image is seen {epochs:.3g} times; use more images, or fewer config.steps")
        return "\n".join(lines)

    def load(self) -> None:
        """Loads frozen weights from their sources, and the state from the last checkpoint or, but for parameters of
        another run's checkpoint, from the sources: `state`, `frozen`; `origins`, prefix -> {"source", "sha256"} of the
        initial weights; and `inherited`, the record of the checkpoint that it began with, see `Parent.record`."""
        program, began = self.program, time.perf_counter()
        first = jax.process_index() == 0
        if self.start and first:  # Before checkpoints are opened: another process may still train here.
            self.lock = lock.Lock(self.workdir)
        restored = checkpoint.restore_newest(self.workdir, lambda step: program.abstract_state(program.stage_at(step)))
        resumes, self.start = restored is not None, restored.step if restored else 0
        parent, taken = self.parent, self.taken
        record = restored.meta.get("init_from") if resumes else None
        if record and record["frozen"]:
            parent, taken = workdirs.Parent.recorded(record), record["frozen"]
        elif parent:
            record = parent.record(set(taken) & set(program.abstract_frozen()))
        wanted = set(program.abstract_frozen() if resumes else program.arrays)
        arrays, origins = workdirs.initial_arrays(program, wanted - set(taken))
        if taken:
            arrays |= checkpoint.restore_arrays(parent.workdir, parent.step, {n: program.arrays[n] for n in taken})[0]
        if resumes:
            workdirs.check_sources(restored.meta["sources"], origins)
            self.batches.set_state(restored.data)
            self.evaluation_due = restored.meta.get("evaluation_due", False)
        if first:  # Nothing is written before all inputs have been checked.
            self.lock = self.lock or lock.Lock(self.workdir)
            workdirs.write_config(self.workdir, self.config)
            (self.workdir / "done").unlink(missing_ok=True)  # The run may have ended with fewer steps before.
            for step, why in restored.damaged.items() if resumes else ():
                aside = checkpoint.set_aside(self.workdir, step)
                say(f"the checkpoint of step {step} is damaged ({why}): kept as {aside}, step {self.start} is used")
        distributed.check_same({f"the checksum of the {part} weights": o["sha256"] for part, o in origins.items()})
        # After the first comparison process 0 has written config.json.
        seen = workdirs.seen(self.workdir / "config.json")
        distributed.check_same({"config.json in --workdir": seen, "the checkpoint restored": self.start})
        state = restored.state if resumes else program.init_state(arrays)
        say(f"weights loaded in {time.perf_counter() - began:.1f} s")
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
            if self.init_from:
                began = f"{record['workdir']}, step {record['step']}" if record else "the weights of its config alone"
                say(f"note: --init_from={self.init_from} is not read again: this run began with {began}")
            if self.steps_before and (note := workdirs.extension(program, self.start, self.steps_before)):
                say(note)
        self.state, self.frozen = state, {n: arrays[n] for n in program.abstract_frozen()}
        self.origins, self.inherited = origins, record

    def run(self) -> bool:
        """Trains to the end, or to SIGTERM or the first SIGINT; saves in each case. Returns whether the run is
        finished, with its last evaluation; if not, `stopped_by` is the signal. A UserError where weights are missing or
        invalid. A RunError, with the last checkpoint kept, where the loss or gradient is not finite, too many images
        cannot be read, a checkpoint cannot be written, or another process is lost."""
        c, first, done = self.config, jax.process_index() == 0, self.workdir / "done"
        if self.finished:
            return True
        say(self.describe())
        with contextlib.ExitStack() as over:

            def opened(thing):
                return over.enter_context(contextlib.closing(thing))

            opened(self.batches)
            over.callback(lambda: self.lock and self.lock.close())
            with distributed.watched(lambda: self.start):
                self.load()
            self.step = self.start
            about = self.workdir, self.step, c.log.tensorboard, c.log.wandb, c.to_dict()
            self.writer = opened(metrics.Writer(*about)) if first else None
            chip = chips.of(self.mesh.devices.flat[0])
            peak = chip.flops * self.mesh.size if chip else None
            rest = range(self.program.stage_at(self.step), len(self.program.stages)) if chip else ()
            mfu = {stage: self.program.flops(stage).total() / peak for stage in rest}
            about = self.writer, self.step, self.total, c.log.every, c.batch_size
            self.progress = opened(metrics.Progress(*about, lambda step: mfu.get(self.program.stage_at(step - 1))))
            self.checkpoints = opened(checkpoint.Checkpoints(self.workdir, c.checkpoint.keep, c.checkpoint.timeout))
            self.profile, self.preempted = opened(Profile(c.profile, self.workdir)), opened(distributed.Preemption())
            try:
                with distributed.watched(lambda: self.step):
                    self._train()
                    self.progress.flush()
                    self._save(wait=True)
            except distributed.Lost:
                self.checkpoints.abandon()
                raise
            except OSError as e:
                advice = f"check that {self.workdir} can be written and that there is space, then start again"
                raise RunError(f"step {self.step}: {e}: {advice}; the last checkpoint is kept") from e
            if finished := self.step >= self.total and not self.evaluation_due:
                if first:
                    done.touch()  # For scripts that start the command again until the run is done.
            else:
                self.stopped_by = self.preempted.signal or signal.SIGTERM
                say(f"{self.stopped_by.name}: saved step {self.step}; the same command resumes from here")
        return finished

    def _train(self) -> None:
        """Trains to the end, or until a signal."""
        steps = Steps(self.program, self.progress.paused, self.saved)
        if self.step == 0 or self.evaluation_due:
            self._evaluate()
        if self.preempted:
            return
        begun = self.state, self.frozen, self._next_batch, self.step, self.total
        for self.step, self.state, values in train_steps(steps, *begun):
            if self.lock:
                self.lock.check()
            self.preempted.after(self.step)
            self.progress.add(self.step, values)
            self._evaluate()
            if self.step % self.config.checkpoint.every == 0:
                self.progress.flush()
                self._save()
            if self.preempted:
                return

    def _next_batch(self) -> dict[str, np.ndarray] | None:
        self.profile.before(self.step)
        began = time.perf_counter()
        batch = self.batches.wait(self.preempted.__bool__)
        self.progress.waited(time.perf_counter() - began, self.batches.decoder)
        return batch

    def _evaluate(self) -> None:
        """Evaluates the current weights, or their moving average, if it is time; what a signal breaks off stays due."""
        last, every = self.step == self.total, self.config.eval.every
        self.evaluation_due = self.evaluator is not None and (last or self.step % every == 0)
        if not self.evaluation_due or self.preempted:
            return
        self.progress.flush()
        began = time.perf_counter()
        params = {**self.frozen, **averaged(self.state)}
        try:
            with self.preempted.at_once():
                row, notes = self.evaluator.scalars(self.program.towers(params), params)
        except distributed.Interrupted:
            say(f"{self.preempted.signal.name}: the evaluation of step {self.step} is left to the next start")
            return
        self.evaluation_due = False
        took = time.perf_counter() - began
        if self.writer:
            self.writer.write(self.step, row)
        say("\n  ".join([f"evaluated step {self.step} in {took:.0f} s: {results.summary(row)}", *notes]))
        self.progress.paused(took)

    def _save(self, wait: bool = False) -> None:
        if self.lock:
            self.lock.check(now=True)
        if self.writer:
            self.writer.flush()
        meta = {"sources": self.origins, "config": json.loads(self.config.to_json())}
        if self.evaluation_due:
            meta["evaluation_due"] = True
        if self.inherited:
            meta["init_from"] = self.inherited
        self.checkpoints.save(self.step, self.state, self.batches.get_state(), meta, wait)
