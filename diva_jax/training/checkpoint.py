"""Checkpoints, by orbax: what is trained (and its moving average), the optimizer, step, PRNG key and data position.

A checkpoint is renamed into place once it is complete, with checksums that are verified when it is read.
Frozen weights are not in it, but the sources and hashes that they were loaded from (`meta`).
"""

import contextlib
import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath

from diva_jax.common import errors, json_files, paths
from diva_jax.common.errors import RunError, UserError, explained
from diva_jax.common.log import say
from diva_jax.training import distributed

ITEMS = ("state", "data", "meta")
# Odd numbers, by axis, that positions are multiplied by; those of Weyl sequences in several dimensions.
_MULTIPLIERS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1)


class Damaged(Exception):
    """A checkpoint is not what was saved; the message says in what."""


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """The sum over an array's 32-bit words of word times an odd number that depends on the position, modulo 2**32: the
    same for every sharding, and changed by each change of a single element, as odd numbers have an inverse there."""
    kind = jnp.dtype(f"uint{min(32, 8 * x.dtype.itemsize)}")
    words = (x if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, kind)).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        multiplier = jnp.uint32(_MULTIPLIERS[axis % len(_MULTIPLIERS)])
        place = (place ^ (place >> 15)) * multiplier + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words * (place * jnp.uint32(2) + jnp.uint32(1)), dtype=jnp.uint32)


def checksums(tree) -> dict[str, int]:
    """Path of each array in a tree, as `jax.tree_util.keystr` writes it -> its checksum, 0 to 2**32 - 1."""
    # One after another: programs that wait for each other's devices can block when many run at once on CPU devices.
    return {jax.tree_util.keystr(path): int(_checksum(a)) for path, a in jax.tree_util.tree_leaves_with_path(tree)}


def text_checksum(*content) -> int:
    """The checksum of values as JSON, 0 to 2**32 - 1."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


class _Description(json_files.Record):
    """What orbax writes about a checkpoint, and reads again when its manager is made."""

    item_handlers: dict[str, str] | str | None = None
    metrics: dict[str, Any] | None = None
    performance_metrics: dict[str, float] = {}
    init_timestamp_nsecs: int | None = None
    commit_timestamp_nsecs: int | None = None
    custom_metadata: dict[str, Any] | None = None


def _read_json(folder: epath.Path, name: str, form: Any = dict[str, Any], **missing) -> Any:
    """The content of a file of a checkpoint; `Damaged` where it is missing or has not this form, a UserError where a
    bucket does not give it; `missing` as for `json_files.read`."""
    try:
        return json_files.read(folder / name, form, "restore it", **missing)
    except UserError as e:
        if paths.is_remote(folder) and not isinstance(e.__cause__, ValueError | FileNotFoundError | None):
            raise  # A bucket that cannot be reached, whose checkpoints may be good.
        raise Damaged(f"its part {name.partition('/')[0]}: {e}") from e


def check_files(folder: epath.Path) -> tuple[dict, dict]:
    """(data position, meta) of a checkpoint, in a folder named by its step, after what a few small reads can tell of
    it: `Damaged` where a part is missing, empty or not readable, or the folder is a copy of another step's."""
    for file in () if paths.is_remote(folder) else Path(folder).rglob("*"):
        if not file.is_dir() and not file.is_file():
            if not os.path.lexists(file):
                raise Damaged("it was deleted meanwhile")
            raise Damaged(f"{file.name} is not a regular file")
        if file.parent.name != "d" and file.stat().st_size > json_files.MAX_BYTES:
            raise Damaged(f"{file.name} has more than {json_files.MAX_BYTES} bytes")
    _read_json(folder, "_CHECKPOINT_METADATA", _Description, missing=None)
    data, meta = (_read_json(folder, f"{item}/metadata") for item in ("data", "meta"))
    if not (folder / "state").exists():
        raise Damaged("its part state is missing")
    for name in ("manifest.ocdbt", "_METADATA"):
        file = folder / "state" / name
        if not file.exists() or not file.stat().length:
            raise Damaged(f"state/{name} is missing or empty")
    written = meta.pop("text_checksum", None)
    if (written is not None or "checksums" in meta) and written != text_checksum(data, meta):
        raise Damaged("its parts data and meta are not those that were saved")
    step = int(folder.name)
    if (there := data.get("batches", step)) != step:
        raise Damaged(f"it is a copy of the checkpoint of step {there}")
    return data, meta


_LISTINGS = 20  # A reader lists again where a trainer has deleted a checkpoint meanwhile.
_RETRY_AFTER_S = (2.0, 8.0, 30.0)  # A save that failed is tried again after each of these.
# orbax logs pages for each failed save, and also raises its error.
absl_logging.get_absl_logger().addFilter(lambda r: r.levelno < logging.ERROR or "/orbax/" not in r.pathname)


def _folder(workdir: epath.PathLike) -> epath.Path:
    return paths.absolute(epath.Path(workdir).expanduser() / "checkpoints")


def damages(workdir: epath.PathLike) -> dict[int, str | None]:
    """Step -> what is wrong, or None, of the checkpoints that were saved, newest first; a UserError, or where a bucket
    does not answer a RunError, without a list."""
    folder = _folder(workdir)
    kind = Exception if paths.is_remote(folder) else FileNotFoundError
    with explained(f"{folder} cannot be read", "check this account's rights, try again", kind):
        for _ in range(_LISTINGS):
            with contextlib.suppress(FileNotFoundError):
                # Of a bucket that does not answer, `is_dir` is false, and `exists` raises.
                there = folder.exists() if paths.is_remote(folder) else folder.is_dir()
                found = ocp.utils.checkpoint_steps_paths(folder) if there else []
                local = () if paths.is_remote(folder) else (folder, *folder.glob("*"))
                found += [f for f in local if os.path.islink(f) and not f.exists()]
                if folder in found:
                    raise UserError(f"{folder} is a link to a folder that is not there: put it back, or remove it")
                damages: dict[int, str | None] = {}
                for step in sorted({int(f.name) for f in found if f.name.isdecimal()}, reverse=True):
                    try:
                        check_files(folder / str(step))
                        damages[step] = None
                    except Damaged as e:
                        damages[step] = str(e)
                return damages
    raise UserError(f"{folder} changes too fast to be read: try again, with a larger config.checkpoint.keep")


def steps(workdir: epath.PathLike) -> list[int]:
    """The steps whose checkpoints are whole, in order; nothing is written."""
    return sorted(step for step, why in damages(workdir).items() if why is None)


def latest_step(workdir: epath.PathLike) -> int | None:
    """The newest whole checkpoint's step, or None."""
    return max(steps(workdir), default=None)


def stored(workdir: epath.PathLike, key: str, step: int | None = None) -> dict | None:
    """The object that a whole checkpoint, by default the newest, has in its meta under a key, or None; a UserError
    where it is damaged."""
    step = latest_step(workdir) if step is None else step
    with _reading(workdir, step):
        content = None if step is None else _read_json(_folder(workdir) / str(step), "meta/metadata").get(key)
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


class Restored(NamedTuple):
    """What a checkpoint holds, and what is wrong with newer ones, by step."""

    step: int
    state: dict
    data: dict
    meta: dict
    damaged: dict[int, str]


def restore_newest(workdir: epath.PathLike, abstract_state: Callable[[int], dict]) -> Restored | None:
    """The newest checkpoint that is what was saved, its state laid out as `abstract_state` says for a step; None where
    there is no checkpoint at all. A UserError where every one is damaged, a RunError where a bucket cannot be reached,
    whose checkpoints may be good."""
    unusable = {}
    for step, reason in damages(workdir).items():
        if reason is None:
            try:
                restored = restore(workdir, step, abstract_state(step))
            except Damaged as e:
                reason = str(e)
            except Exception as e:  # tensorstore and orbax raise many types for files that are damaged.
                if paths.is_remote(workdir) or distributed.is_lost(e):
                    raise RunError(f"the checkpoint of step {step} cannot be read: {errors.reason(e)}") from e
                reason = errors.reason(e)
            if not distributed.any_failed(reason is not None):
                return Restored(step, *restored, unusable)
        unusable[step] = reason or "another process cannot read it"
    if unusable:
        newest = max(unusable)
        problem = f"none of the {len(unusable)} checkpoints in {_folder(workdir)} can be restored"
        advice = "put a copy of a good one there, or move the folder away to begin anew"
        raise UserError(f"{problem} (that of step {newest}: {unusable[newest]}): {advice}")
    return None


def identity(workdir: epath.PathLike, step: int) -> str:
    """SHA-256 of a checkpoint's own description, which has the time at which it was written, as hex digits."""
    folder = _folder(workdir) / str(step)
    files = [f for f in (folder / "_CHECKPOINT_METADATA", folder / "state" / "_METADATA") if f.exists()]
    return hashlib.sha256(b"".join(map(json_files.read_bytes, files))).hexdigest()


def restore(workdir: epath.PathLike, step: int, wanted: dict, partial: bool = False) -> tuple[dict, dict, dict]:
    """(state laid out as `wanted` says, data position, meta); `Damaged` where it is not what was saved. With `partial`,
    `wanted` is a part of what the checkpoint has."""
    folder = _folder(workdir) / str(step)
    data, meta = check_files(folder)
    given = ocp.checkpoint_utils.construct_restore_args(wanted)
    args = ocp.args.PyTreeRestore(wanted, partial_restore=partial, restore_args=given)
    state = ocp.PyTreeCheckpointHandler().restore(folder / "state", args=args)
    if (written := meta.pop("checksums", None)) is None:
        say(f"the checkpoint of step {folder.name} was saved without checksums: its arrays cannot be verified")
    elif wrong := [path for path, value in checksums(state).items() if written.get(path) != value]:
        raise Damaged(f"{len(wrong)} arrays are not those that were saved, the first of them {wrong[0]}")
    return state, data, meta


@contextlib.contextmanager
def _reading(workdir: epath.PathLike, step: int):
    """Context manager in which what tensorstore and orbax raise for damaged files becomes a `UserError`, and what they
    raise where a bucket cannot be reached, whose files may be good, a `RunError`."""
    try:
        yield
    except Exception as e:
        reason = str(e) if isinstance(e, Damaged) else errors.reason(e)
        problem = f"the checkpoint of step {step} in {workdir} cannot be read ({reason})"
        if paths.is_remote(workdir) and not isinstance(e, Damaged):
            raise RunError(problem) from e
        raise UserError(f"{problem}: use another one of {steps(workdir)}") from e


def trained(workdir: epath.PathLike, step: int) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """ "params" and, where the run keeps one, "ema", the moving average -> name -> shape and dtype of what a checkpoint
    has; a UserError where it is damaged."""
    with _reading(workdir, step):
        tree = ocp.PyTreeCheckpointHandler().metadata(_folder(workdir) / str(step) / "state").tree
        kinds = [kind for kind in ("params", "ema") if kind in tree]
        return {k: {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in tree[k].items()} for k in kinds}


def restore_arrays(
    workdir: epath.PathLike, step: int, arrays: Mapping[str, jax.ShapeDtypeStruct], kind: str = "params"
) -> tuple[dict[str, jax.Array], dict]:
    """Some of what is `trained`, whatever the optimizer was, of the shapes, dtypes and shardings in `arrays`: ({name:
    array}, meta). A UserError where the checkpoint is damaged."""
    saved = trained(workdir, step)[kind]
    with _reading(workdir, step):
        wanted = {n: saved[n].update(sharding=a.sharding) for n, a in arrays.items()}
        found, _, meta = restore(workdir, step, {kind: wanted}, partial=True)
    return {n: a.astype(arrays[n].dtype) for n, a in found[kind].items()}, meta


def restore_params(workdir: epath.PathLike, step: int, device: jax.Device) -> tuple[dict[str, jax.Array], dict]:
    """The trained parameters, or their moving average where the run keeps one: ({name: array on the device}, meta); a
    UserError where the checkpoint is damaged."""
    kind, arrays = list(trained(workdir, step).items())[-1]
    here = jax.sharding.SingleDeviceSharding(device)
    return restore_arrays(workdir, step, {n: a.update(sharding=here) for n, a in arrays.items()}, kind)


class Checkpoints(contextlib.AbstractContextManager):
    """Writes checkpoints to a workdir, of which the newest `keep` are kept; `timeout`: seconds in which all processes
    must have written their parts. A UserError where the description of one that is there is damaged."""

    def __init__(self, workdir: epath.PathLike, keep: int = 3, timeout: int = 300):
        self._workdir, self._keep, self._timeout = workdir, keep, timeout
        self._manager = self._open()

    def __exit__(self, *_):
        self.close()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep,
            create=True,
            cleanup_tmp_directories=True,
            # Where a folder cannot be made, the threads that would fill it wait for it for five minutes.
            async_options=ocp.AsyncOptions(timeout_secs=self._timeout, create_directories_asynchronously=False),
        )
        problem = f"{_folder(self._workdir)}: the file _CHECKPOINT_METADATA of a checkpoint is damaged"
        damage = (AttributeError, KeyError, TypeError, ValueError, RecursionError)
        with explained(problem, "move that checkpoint away", *damage):
            return ocp.CheckpointManager(_folder(self._workdir), options=options, item_names=ITEMS)

    def save(self, step: int, state: dict, data: dict, meta: dict, wait: bool = False) -> None:
        """Starts to write a checkpoint, unless it exists; returns when `state` may be overwritten, with `wait` when it
        is on disk. An earlier save that failed is detected here too; the present state is then written instead. A save
        that fails is tried again, a few times, and is then a RunError; complete checkpoints are not changed."""
        meta = meta | {"checksums": checksums(state)}
        meta |= {"text_checksum": text_checksum(data, meta)}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data), meta=ocp.args.JsonSave(meta)
        )
        reasons = {}  # In order, each once: what a failed save leaves behind may be why the next one fails.
        for pause in (*_RETRY_AFTER_S, None):
            reason = None
            try:  # orbax reports a failed save only when waited for, and does not recover from it.
                self._manager = self._manager or self._open()
                self._manager.wait_until_finished()
                if step not in self._manager.all_steps():
                    self._manager.save(step, args=items)
                if wait:
                    self._manager.wait_until_finished()
            except Exception as e:
                reason = errors.reason(e)
            if not distributed.any_failed(reason is not None):
                return
            reason, self._manager, wait = reason or "another process could not write its part", None, True
            reasons[reason] = None
            if pause is not None:
                say(f"step {step}: saving failed, tried again in {pause:g} s: {reason}")
                time.sleep(pause)
        # The disk may be full of what failed saves have written; their threads may write there even after a removal.
        for pause in (0.0, 1.0, 1.0) if jax.process_index() == 0 else ():
            time.sleep(pause)
            with contextlib.suppress(Exception):  # A bucket may be gone.
                for folder in _folder(self._workdir).glob("*.orbax-checkpoint-tmp*"):  # Of saves that have not ended.
                    folder.rmtree()
        last = latest_step(self._workdir)
        whole = "there is no earlier one" if last is None else f"the last whole one is of step {last}"
        raise RunError(
            f"step {step}: no checkpoint can be written to {_folder(self._workdir)} ({', then '.join(reasons)}), tried "
            f"{len(_RETRY_AFTER_S) + 1} times; {whole}: make room or fix the access rights, then start the same "
            f"command again{'' if last is None else ', which resumes from there'}"
        )

    def close(self) -> None:
        """Waits for a save in progress. If that save fails, it is said, not raised."""
        if self._manager is not None:
            try:
                self._manager.close()
            except Exception as e:
                say(f"the last save failed: {errors.reason(e)}")
        self._manager = None

    def abandon(self) -> None:
        """Waits for nothing: a save that other processes take part in may never end."""
        self._manager = None
