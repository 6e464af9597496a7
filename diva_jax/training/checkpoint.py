"""Checkpoints, by orbax: what is trained (and its moving average), the optimizer, step, PRNG key and data position.

A checkpoint is renamed into place once it is complete, with checksums that are verified when it is read (`integrity`).
Frozen weights are not in it, but the sources and hashes that they were loaded from (`meta`).
"""

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath

from diva_jax.common import json_files, paths
from diva_jax.common.errors import RunError, UserError
from diva_jax.common.log import say
from diva_jax.training import distributed, integrity
from diva_jax.training.integrity import Damaged

_UNFINISHED = ".orbax-checkpoint-tmp"  # In the names of folders of saves that have not ended.
_LISTINGS = 20  # A reader lists again where a trainer has deleted a checkpoint meanwhile.
_RETRY_AFTER_S = (2.0, 8.0, 30.0)  # A save that failed is tried again after each of these.


# orbax logs pages for each failed save, and also raises its error.
absl_logging.get_absl_logger().addFilter(lambda r: r.levelno < logging.ERROR or "/orbax/" not in r.pathname)


def _folder(workdir: epath.PathLike) -> epath.Path:
    return paths.absolute(epath.Path(workdir) / "checkpoints")


def _damages(workdir: epath.PathLike) -> dict[int, str | None]:
    """Step -> what is wrong, or None, of the checkpoints that were saved to the end, newest first; a UserError where
    they cannot be listed.
    """
    folder = _folder(workdir)
    try:
        for _ in range(_LISTINGS):
            with contextlib.suppress(FileNotFoundError):
                found = ocp.utils.checkpoint_steps_paths(folder) if folder.is_dir() else []
                local = () if paths.is_remote(folder) else (folder, *folder.glob("*"))
                found += [f for f in local if os.path.islink(f) and not f.exists()]
                if folder in found:
                    raise UserError(f"{folder} is a link to a folder that is not there: put it back, or remove it")
                steps = sorted({int(f.name) for f in found if f.name.isdecimal()}, reverse=True)
                return {step: integrity.damage(folder / str(step)) for step in steps}
    except Exception as e:
        if isinstance(e, UserError) or not paths.is_remote(folder):
            raise
        raise UserError(f"{folder} cannot be read ({paths.reason(e)}): check this account's rights, try again") from e
    raise UserError(f"{folder} changes too fast to be read: try again, with a larger config.checkpoint.keep")


def steps(workdir: epath.PathLike) -> list[int]:
    """The steps whose checkpoints are whole, in order; nothing is written."""
    return sorted(step for step, why in _damages(workdir).items() if why is None)


def damaged(workdir: epath.PathLike) -> dict[int, str]:
    """Step -> what is wrong, of the checkpoints of which a part is missing, empty or not readable."""
    return {step: why for step, why in _damages(workdir).items() if why is not None}


def latest_step(workdir: epath.PathLike) -> int | None:
    """The newest whole checkpoint's step, or None."""
    return max(steps(workdir), default=None)


def stored_config(workdir: epath.PathLike) -> dict | None:
    """The config that the newest whole checkpoint was saved with, or None."""
    step = latest_step(workdir)
    content = None if step is None else integrity.read_text(_folder(workdir) / str(step), "meta").get("config")
    return content if isinstance(content, dict) else None


def set_aside(workdir: epath.PathLike, step: int) -> epath.Path:
    """Moves a checkpoint to `workdir/damaged`, where no run looks for it; returns its new folder."""
    aside = _folder(workdir).parent / "damaged"
    aside.mkdir(parents=True, exist_ok=True)
    name, number = str(step), 0
    while (aside / name).exists():
        number += 1
        name = f"{step}-{number}"
    return (_folder(workdir) / str(step)).rename(aside / name)


@contextlib.contextmanager
def _quiet(read_only: bool = True):
    """Without orbax's warnings about what is as it should be, such as that a read-only folder is read-only."""
    before = absl_logging.get_verbosity()
    if read_only:
        absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        yield
    finally:
        absl_logging.set_verbosity(before)


class Restored(NamedTuple):
    """What a checkpoint holds, and what is wrong with newer ones, by step."""

    step: int
    state: dict
    data: dict
    meta: dict
    damaged: dict[int, str]


def restore_newest(workdir: epath.PathLike, abstract_state: Callable[[int], dict]) -> Restored | None:
    """Restores the newest checkpoint that is what was saved; nothing is written. None where there is no checkpoint at
    all.

    `abstract_state` gives the layout of a step's state. A UserError where every checkpoint is damaged, a RunError where
    a bucket cannot be reached, whose checkpoints may be good.
    """
    unusable = {}
    for step, reason in _damages(workdir).items():
        if reason is None:
            with Checkpoints(workdir, read_only=True) as checkpoints:
                try:
                    restored = checkpoints.restore(step, abstract_state(step))
                except Damaged as e:
                    reason = str(e)
                except Exception as e:  # tensorstore and orbax raise many types for files that are damaged.
                    if paths.is_remote(workdir) or distributed.is_lost(e):
                        raise RunError(f"the checkpoint of step {step} cannot be read: {paths.reason(e)}") from e
                    reason = paths.reason(e)
            if not distributed.any_failed(reason is not None):
                return Restored(step, *restored, unusable)
        unusable[step] = reason or "another process cannot read it"
    if unusable:
        newest = max(unusable)
        raise UserError(
            f"none of the {len(unusable)} checkpoints in {_folder(workdir)} can be restored (that of step {newest}: "
            f"{unusable[newest]}): put a copy of a good one there, or move the folder away to begin anew"
        )
    return None


def identity(workdir: epath.PathLike, step: int) -> str:
    """SHA-256 of a checkpoint's own description, which has the time at which it was written, as hex digits."""
    folder = _folder(workdir) / str(step)
    files = [f for f in (folder / "_CHECKPOINT_METADATA", folder / "state" / "_METADATA") if f.exists()]
    return hashlib.sha256(b"".join(map(json_files.read_bytes, files))).hexdigest()


class Checkpoints:
    """The checkpoints of a workdir, of which the newest `keep` are kept; `timeout`: seconds in which all processes must
    have written their parts.

    With `read_only` nothing is made, cleaned up or deleted, so that another process may write there.
    """

    def __init__(self, workdir: epath.PathLike, keep: int = 3, timeout: int = 300, read_only: bool = False):
        self._workdir, self._keep, self._timeout, self._read_only = workdir, keep, timeout, read_only
        self._manager = self._open(item_names=integrity.ITEMS)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _open(self, **kw) -> ocp.CheckpointManager:
        writing = dict(max_to_keep=self._keep, create=True, cleanup_tmp_directories=True)
        options = ocp.CheckpointManagerOptions(
            **(dict(read_only=True, save_interval_steps=0, create=False) if self._read_only else writing),
            # Where a folder cannot be made, the threads that would fill it wait for it for five minutes.
            async_options=ocp.AsyncOptions(timeout_secs=self._timeout, create_directories_asynchronously=False),
        )
        for last in [False] * _LISTINGS + [True]:
            try:
                with _quiet(self._read_only):
                    return ocp.CheckpointManager(_folder(self._workdir), options=options, **kw)
            except FileNotFoundError:  # A trainer has just deleted a checkpoint that orbax had listed.
                if last or not self._read_only:
                    raise
            except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as e:
                raise UserError(
                    f"{_folder(self._workdir)}: the file _CHECKPOINT_METADATA of a checkpoint is damaged "
                    f"({paths.reason(e)}): move that checkpoint away"
                ) from e

    def save(self, step: int, state: dict, data: dict, meta: dict, wait: bool = False) -> None:
        """Starts to write a checkpoint; returns when `state` may be overwritten, with `wait` when it is on disk. No-op
        where it exists.

        An earlier save that failed is detected here too; the present state is then written instead. A save that fails
        is tried again, a few times, and is then a RunError; complete checkpoints are not changed.
        """
        meta = meta | {"checksums": integrity.checksums(state)}
        meta |= {"text_checksum": integrity.text_checksum(data, meta)}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data), meta=ocp.args.JsonSave(meta)
        )
        reasons = {}  # In order, each once: what a failed save leaves behind may be why the next one fails.
        for pause in (*_RETRY_AFTER_S, None):
            reason = self._try_to_save(step, items, wait)
            if not distributed.any_failed(reason is not None):
                return
            reason, self._manager, wait = reason or "another process could not write its part", None, True
            reasons[reason] = None
            if pause is not None:
                say(f"step {step}: saving failed, tried again in {pause:g} s: {reason}")
                time.sleep(pause)
        self._discard_unfinished()
        raise RunError(
            f"step {step}: no checkpoint can be written to {_folder(self._workdir)} ({', then '.join(reasons)}), tried "
            f"{len(_RETRY_AFTER_S) + 1} times; the last whole one is of step {latest_step(self._workdir)}: make room "
            "or fix the access rights, then start the same command again, which resumes from there"
        )

    def _try_to_save(self, step: int, items: ocp.args.Composite, wait: bool) -> str | None:
        """None, or why it failed. orbax reports a failed save only when waited for, and does not recover from it."""
        try:
            self._manager = self._manager or self._open(item_names=integrity.ITEMS)
            self._manager.wait_until_finished()
            if step not in self._manager.all_steps():
                self._manager.save(step, args=items)
            if wait:
                self._manager.wait_until_finished()
        except Exception as e:
            return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
        return None

    def _discard_unfinished(self) -> None:
        """Removes what failed saves have written so far, on the first process; the disk may be full of it."""
        for pause in (0.0, 1.0, 1.0) if jax.process_index() == 0 else ():
            # Threads of the failed save may still be writing there, also after a removal, and a bucket may be gone.
            time.sleep(pause)
            with contextlib.suppress(Exception):
                for folder in _folder(self._workdir).glob(f"*{_UNFINISHED}*"):
                    folder.rmtree()

    def restore(self, step: int, abstract_state: dict) -> tuple[dict, dict, dict]:
        """(state laid out as `abstract_state` says, data position, meta); `Damaged` where it is not what was saved."""
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore(), meta=ocp.args.JsonRestore()
        )
        integrity.check_files(_folder(self._workdir) / str(step))
        found = self._manager.restore(step, args=items)
        return found["state"], found["data"], _verified(step, found["state"], found["meta"])

    def _tree(self, step: int) -> dict:
        """The train state of a checkpoint, with shapes and dtypes as leaves."""
        with _quiet():  # orbax looks for a file of whole checkpoints in this item's folder.
            return ocp.PyTreeCheckpointer().metadata(self._manager.directory / str(step) / "state").item_metadata.tree

    def trained(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Name -> shape and dtype of the trained parameters in a checkpoint."""
        with self._reading(step):
            return {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in self._tree(step)["params"].items()}

    @contextlib.contextmanager
    def _reading(self, step: int):
        """Turns the many types that tensorstore and orbax raise for damaged files into a `UserError`."""
        try:
            yield
        except Exception as e:
            reason = str(e) if isinstance(e, Damaged) else paths.reason(e)
            raise UserError(
                f"the checkpoint of step {step} in {self._workdir} cannot be read ({reason}): use another one of "
                f"{steps(self._workdir)}"
            ) from e

    def restore_arrays(
        self, step: int, arrays: dict[str, jax.ShapeDtypeStruct], kind: str = "params"
    ) -> tuple[dict[str, jax.Array], dict]:
        """Restores some trained parameters ("params"), or their moving averages ("ema"), whatever the optimizer was.

        `arrays` has name -> shape, dtype and sharding of the result. Returns ({name: array}, meta); a UserError where
        the checkpoint is damaged.
        """
        folder = _folder(self._workdir) / str(step)
        with self._reading(step):
            integrity.check_files(folder)
            saved = self._tree(step)[kind]
            wanted = {n: jax.ShapeDtypeStruct(a.shape, saved[n].dtype, sharding=a.sharding) for n, a in arrays.items()}
            restore = ocp.args.PyTreeRestore(
                {kind: wanted},
                partial_restore=True,
                restore_args=ocp.checkpoint_utils.construct_restore_args({kind: wanted}),
            )
            with self._open(item_handlers={"state": ocp.PyTreeCheckpointHandler()}) as manager:
                found = manager.restore(step, args=ocp.args.Composite(state=restore))["state"][kind]
            meta = _verified(step, {kind: found}, integrity.read_text(folder, "meta"))
        return {n: a.astype(arrays[n].dtype) for n, a in found.items()}, meta

    def restore_params(self, step: int, device: jax.Device) -> tuple[dict[str, jax.Array], dict]:
        """The trained parameters, or their moving average where the run keeps one: ({name: array on the device}, meta);
        a UserError where the checkpoint is damaged.
        """
        with self._reading(step):
            tree = self._tree(step)
            kind = "ema" if "ema" in tree else "params"
            here = jax.sharding.SingleDeviceSharding(device)
            arrays = {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here) for n, a in tree[kind].items()}
        return self.restore_arrays(step, arrays, kind)

    def close(self) -> None:
        """Waits for a save in progress. If that save fails, it is said, not raised."""
        if self._manager is not None:
            try:
                self._manager.close()
            except Exception as e:
                say(f"the last save failed: {paths.reason(e)}")
        self._manager = None

    def abandon(self) -> None:
        """Waits for nothing: a save that other processes take part in may never end."""
        self._manager = None


def _verified(step: int, state: dict, meta: dict) -> dict:
    """`meta` as `save` was given it, if the arrays have the checksums in it; else raises `Damaged`."""
    meta = {k: v for k, v in meta.items() if k != "text_checksum"}
    if (written := meta.pop("checksums", None)) is None:
        say(f"the checkpoint of step {step} was saved without checksums: its arrays cannot be verified")
    else:
        integrity.verify(state, written)
    return meta
