"""Reports of a run: metrics.jsonl, TensorBoard events, log.txt and progress lines."""

import contextlib
import importlib
import json
import math
import time
import uuid
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from diva_jax.common import json_files, log, paths
from diva_jax.common.errors import RunError, UserError, explained
from diva_jax.data.pipeline import Decoder


class Writer:
    """Appends rows to `metrics.jsonl`, TensorBoard and Weights & Biases, and messages to `log.txt`. Rows of an
    interrupted run after `step` are removed. Each row has `seconds`, the time since this session of the run began;
    `sessions.json` lists the sessions with their first step, time, versions and devices. In a bucket, the files are
    updated twice per minute, and by `flush` and `close`. A UserError where Weights & Biases starts no run."""

    def __init__(
        self, workdir: epath.PathLike, step: int, tensorboard: bool, wandb: str = "", config: dict | None = None
    ):
        path = epath.Path(workdir) / "metrics.jsonl"
        lines = json_files.read_bytes(path, json_files.MAX_LINES_BYTES).splitlines() if path.exists() else []
        found: list[int | None] = [None] * len(lines)
        for i, line in enumerate(lines):
            with contextlib.suppress(ValueError, TypeError, KeyError):
                at = json_files.decoded(line)["step"]
                found[i] = at if type(at) is int else None
        # The last row may have been truncated when the process was killed.
        if odd := sum(at is None for at in found[:-1]):
            log.say(f"{path}: {odd} lines that are no rows of a log are removed")
        kept = [line + b"\n" for line, at in zip(lines, found, strict=True) if at is not None and at <= step]
        paths.write_whole(path, b"".join(kept))
        self._mirror, self._opened = paths.Mirror(path.parent), contextlib.ExitStack()
        self._opened.callback(self._mirror.close)
        local, printed = self._mirror.local, path.parent / "log.txt"
        for file in (path, printed):
            if file.exists() and not (local / file.name).exists():
                (local / file.name).write_bytes(file.read_bytes())
        self._file = self._opened.enter_context(open(local / path.name, "a", buffering=1))
        self._began = time.monotonic()
        sessions = path.parent / "sessions.json"
        try:
            found = json_files.read(sessions, list[Any], "", [])
        except UserError:  # Only for the reader: a damaged file does not stop a run.
            if sessions.is_dir():
                raise
            found = []
        found.append({"step": step, "started": log.now(), **log.describe()})
        paths.write_whole(sessions, json.dumps(found, indent=1))
        log.keep_in(self._opened.enter_context(open(local / printed.name, "a", buffering=1)))
        self._opened.callback(log.keep_in, None)
        self._board = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(self._mirror.local / "tensorboard"), purge_step=step + 1)
            self._opened.callback(self._board.close)
        self._wandb = None
        if wandb:
            file = path.parent / "wandb_id.txt"  # The id of the run that belongs to this workdir.
            if not file.exists():
                paths.write_whole(file, uuid.uuid4().hex)
            advice = "log in with `wandb login`, set WANDB_MODE=offline, or leave config.log.wandb empty"
            with explained(f"config.log.wandb={wandb!r}: no run could be started", advice, Exception):
                init = importlib.import_module("wandb").init
                about = dict(id=json_files.read_bytes(file, 2**10).decode(), name=path.parent.name, config=config or {})
                self._wandb = init(project=wandb, dir=str(self._mirror.local), resume="allow", **about)
            self._opened.callback(self._wandb.finish)

    def write(self, step: int, row: dict[str, float]) -> None:
        seconds = round(time.monotonic() - self._began, 1)
        self._file.write(json.dumps({"step": step, **row, "seconds": seconds}) + "\n")
        if self._board:
            for name, value in row.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        if self._wandb:
            self._wandb.log(row, step=step)
        self._mirror.push()

    def flush(self) -> None:
        """Copies everything written so far to the workdir."""
        self._mirror.push(force=True)

    def close(self) -> None:
        self._opened.close()


class Progress:
    """Collects the steps' metrics, checks that they are finite, and reports every `every` steps to the writer, if any.
    The metrics of a step are fetched after the next step has been started, so that the device does not wait. `images`
    is their number per step; `utilisation` gives the MFU of a step at one image per second, None if it is not known."""

    def __init__(self, writer: Writer | None, start: int, total: int, every: int, images: int, utilisation=None):
        self._writer, self._total, self._every, self._images = writer, total, every, images
        self._utilisation: Callable[[int], float | None] = utilisation or (lambda step: None)
        self._pending: tuple[int, dict] | None = None
        self._window: list[dict[str, float]] = []
        self._waited, self._window_start = 0.0, time.perf_counter()
        self._broken = self._skipped = 0
        # Where stdout is no terminal, there are the lines of `_report` alone.
        self._bar = log.progress("training", total, every=math.inf, initial=start)
        self.close = self._bar.close

    def waited(self, seconds: float, decoder: Decoder) -> None:
        """Adds time spent waiting for a batch; `decoder` has counted the images that could not be used so far."""
        self._waited += seconds
        self._broken, self._skipped = decoder.count, decoder.skipped

    def paused(self, seconds: float) -> None:
        """Excludes time without training steps from images per second and from the remaining time."""
        self._window_start += seconds

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step that has been started, and reports the step before it."""
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Waits for the pending step and reports it; a RunError where its loss or gradient is not finite."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {k: float(np.asarray(v)) for k, v in metrics.items()}
        if bad := [k for k, v in values.items() if not math.isfinite(v)]:
            problem = f"step {step}: {' and '.join(bad)} not finite; stopped, the last checkpoint is from before"
            raise RunError(f"{problem}: start another --workdir with a lower config.optim.lr or config.dtype=float32")
        self._window.append(values)
        if step % self._every == 0 or step == self._total:
            self._report(step)
        self._bar.update()

    def _report(self, step: int) -> None:
        now = time.perf_counter()
        elapsed = now - self._window_start
        row = {k: float(np.mean([w[k] for w in self._window])) for k in self._window[0]}
        row["lr"] = self._window[-1]["lr"]
        row["images_per_s"] = len(self._window) * self._images / elapsed
        if utilisation := self._utilisation(step):
            row["mfu"] = row["images_per_s"] * utilisation
        row["data_wait"] = min(1.0, self._waited / elapsed)
        row["broken_images"] = self._broken
        if self._skipped:
            row["skipped_images"] = self._skipped
        if self._writer:
            self._writer.write(step, row)
            mfu = f"  MFU {100 * row['mfu']:.1f}%" if "mfu" in row else ""
            log.say(
                f"step {step}/{self._total}  loss {row['loss']:.4f}  grad {row['grad_norm']:.3g}  lr {row['lr']:.3g}  "
                f"{row['images_per_s']:.1f} images/s{mfu}  data wait {100 * row['data_wait']:.0f}%  "
                f"ETA {log.Bar.format_interval(elapsed / len(self._window) * (self._total - step))}"
            )
        self._window, self._waited, self._window_start = [], 0.0, now
