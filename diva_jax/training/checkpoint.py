"""Checkpoints: what is trained (and its moving average), the optimizer, step, PRNG key and data position, by orbax.

Frozen weights are not in them; the sources and hashes they were loaded from are (`meta`), and are compared when
a run goes on. A checkpoint is renamed into place when it is whole, so a killed save leaves the last one intact.
"""

import hashlib
import logging
import time

import jax
import orbax.checkpoint as ocp
from etils import epath

from diva_jax.common import paths
from diva_jax.common.errors import RunError
from diva_jax.common.log import say
from diva_jax.training import distributed

logger = logging.getLogger(__name__)

_PAUSES = (2.0, 8.0, 30.0)  # Seconds before a save that failed is tried again.


def _folder(workdir: epath.PathLike) -> epath.Path:
    return paths.absolute(epath.Path(workdir) / "checkpoints")


def steps(workdir: epath.PathLike) -> list[int]:
    """The steps whose checkpoints are whole, in order; nothing is made where there is none."""
    folder = _folder(workdir)
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def latest_step(workdir: epath.PathLike) -> int | None:
    """The newest whole checkpoint's step, or None."""
    return (steps(workdir) or [None])[-1]


def identity(workdir: epath.PathLike, step: int) -> str:
    """SHA-256 of a checkpoint's own description, which has the time at which it was written, as hex digits."""
    folder = _folder(workdir) / str(step)
    files = [f for f in (folder / "_CHECKPOINT_METADATA", folder / "state" / "_METADATA") if f.exists()]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


class Checkpoints:
    """The checkpoints of a workdir.

    Args:
      workdir: the run's folder; checkpoints are in its `checkpoints`.
      keep: checkpoints to keep, the newest ones.
      timeout: seconds in which all processes must have written their parts.
    """

    def __init__(self, workdir: epath.PathLike, keep: int = 3, timeout: int = 300):
        self._workdir, self._keep, self._timeout = workdir, keep, timeout
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep,
            create=True,
            cleanup_tmp_directories=True,
            # Where a folder cannot be made, the threads that would fill it wait for it for five minutes.
            async_options=ocp.AsyncOptions(timeout_secs=self._timeout, create_directories_asynchronously=False),
        )
        return ocp.CheckpointManager(
            _folder(self._workdir),
            options=options,
            item_names=("state", "data", "meta"),
        )

    def save(self, step: int, state: dict, data: dict, meta: dict, wait: bool = False) -> None:
        """Starts to write a checkpoint; returns when `state` may be overwritten. No-op where it exists.

        That an earlier save failed is found out here too; the present state is then written in its stead. What
        fails is tried again, a few times; checkpoints that are whole are not touched.

        Args:
          step, state, data, meta: what `restore` returns.
          wait: until it is on disk.

        Raises:
          RunError: it could not be written.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data), meta=ocp.args.JsonSave(meta)
        )
        reasons = {}  # In order, each once: what a failed save leaves behind may be why the next one fails.
        for pause in (*_PAUSES, None):
            reason = self._try_to_save(step, items, wait)
            if not distributed.any_failed(reason is not None):
                return
            reason, self._manager = reason or "another process could not write its part", None
            reasons[reason] = None
            if pause is not None:
                say(f"step {step}: saving failed, tried again in {pause:g} s: {reason}")
                time.sleep(pause)
            wait = True
        raise RunError(
            f"step {step}: no checkpoint can be written to {_folder(self._workdir)} ({', then '.join(reasons)}), tried "
            f"{len(_PAUSES) + 1} times; the last whole one is of step {latest_step(self._workdir)}: make room or fix "
            "the access rights, then start the same command again, which goes on from there"
        )

    def _try_to_save(self, step: int, items: ocp.args.Composite, wait: bool) -> str | None:
        """None, or why it failed. orbax reports a failed save only when waited for, and does not recover from it."""
        try:
            self._manager = self._manager or self._open()
            self._manager.wait_until_finished()
            if step not in self._manager.all_steps():
                self._manager.save(step, args=items)
            if wait:
                self._manager.wait_until_finished()
        except Exception as e:
            return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
        return None

    def restore(self, step: int, abstract_state: dict) -> tuple[dict, dict, dict]:
        """(state laid out as `abstract_state` says, data position, meta)."""
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore(), meta=ocp.args.JsonRestore()
        )
        found = self._manager.restore(step, args=items)
        return found["state"], found["data"], found["meta"]

    def meta(self, step: int) -> dict:
        """What `save` was given as `meta`."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def _tree(self, step: int) -> dict:
        """The train state of a checkpoint, with shapes and dtypes as leaves."""
        return ocp.PyTreeCheckpointer().metadata(self._manager.directory / str(step) / "state").item_metadata.tree

    def trained(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Name -> shape and dtype of the trained parameters in a checkpoint."""
        return {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in self._tree(step)["params"].items()}

    def restore_arrays(self, step: int, arrays: dict[str, jax.ShapeDtypeStruct], kind: str = "params") -> dict:
        """Some trained parameters ("params"), or their moving averages ("ema"), laid out as `arrays` says."""
        restore = ocp.args.PyTreeRestore(
            {kind: arrays},
            partial_restore=True,
            restore_args=ocp.checkpoint_utils.construct_restore_args({kind: arrays}),
        )
        handlers = {"state": ocp.PyTreeCheckpointHandler()}
        with ocp.CheckpointManager(self._manager.directory, item_handlers=handlers) as manager:
            return manager.restore(step, args=ocp.args.Composite(state=restore))["state"][kind]

    def restore_params(self, step: int, device: jax.Device) -> tuple[dict[str, jax.Array], dict]:
        """What evaluation and export need, whatever the optimizer was.

        Args:
          step: of a checkpoint.
          device: where the arrays go.

        Returns:
          ({name: array} of the trained parameters, or of their moving average if the run keeps one; meta).
        """
        tree, here = self._tree(step), jax.sharding.SingleDeviceSharding(device)
        kind = "ema" if "ema" in tree else "params"
        arrays = {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here) for n, a in tree[kind].items()}
        return self.restore_arrays(step, arrays, kind), self.meta(step)

    def wait(self) -> None:
        """Returns when every save is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being written. What then fails is only logged: nobody asked for it any more."""
        if self._manager is None:
            return
        try:
            self._manager.close()
        except Exception as e:
            logger.warning("the last save failed: %s", e)
        self._manager = None

    def abandon(self) -> None:
        """Waits for nothing: a save that other processes take part in may never end."""
        self._manager = None
