"""Records -> batches of the arrays that an objective asks for: shuffled by one seed, resumable, split over processes.

Examples are numbered from the start of the run: position 0, 1, 2, ... Each epoch is one shuffle of all records, which
depends on `seed` and the epoch alone and decides the record at each position; crops and other random choices depend
on (seed, position) alone. Global batch b of B examples is positions b*B .. (b+1)*B - 1, and process p of P takes
every P-th of them from the p-th on, so that any number of processes together see the same examples in the same rows.
"""

import concurrent.futures
import contextlib
import errno
import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping

import grain
import numpy as np

from diva_jax.common.errors import RunError, UserError, printable
from diva_jax.data import crop, images, sources
from diva_jax.data.inputs import Example, Input
from diva_jax.data.records import Record, Source

logger = logging.getLogger(__name__)

_FOREVER = 2**62  # Positions; more than any run has.
_PAUSES = (0.2, 1.0, 5.0)  # Seconds before a read that failed is tried again.
# Numbers of errors that say nothing of the data: of networks, of disks, and of a lack of memory or descriptors.
_TRANSIENT = frozenset(
    getattr(errno, name)
    for name in "EIO EAGAIN EINTR ESTALE ETIMEDOUT ENETDOWN ENETUNREACH EHOSTDOWN EHOSTUNREACH ECONNRESET ECONNABORTED "
    "ECONNREFUSED ENOTCONN EPIPE ENOMEM EMFILE ENFILE EREMOTEIO".split()
)
_NAMED = 20  # Broken images that the log names; further ones are only counted.
_LOOK_EVERY = 0.5  # Seconds between two looks at whether a wait shall end.
_JUDGED_FROM = 10  # Broken reads up to which the share is not judged: the first image may be a broken one.


class Broken:
    """Counts the records that could not be read; shared by all decoding threads.

    Args:
      max_share: the largest share of broken ones among the records read; above it `add` raises.

    Attributes:
      count: broken records, each counted once.
    """

    def __init__(self, max_share: float):
        self.max_share = max_share
        self._lock = threading.Lock()
        self._read = self._failed = 0
        self._records: set = set()

    @property
    def count(self) -> int:
        return len(self._records)

    def good(self) -> None:
        """Counts a record that was read."""
        with self._lock:
            self._read += 1

    def add(self, record, name: str, reason: str) -> None:
        """Counts a record that could not be read; the first time, the log names it.

        Args:
          record: its number, or anything hashable that stands for it.
          name: its name.
          reason: why it could not be read.

        Raises:
          RunError: there are too many.
        """
        name, reason = printable(name), printable(" ".join(reason.split()))
        with self._lock:
            self._read += 1
            self._failed += 1
            new = record not in self._records
            self._records.add(record)
            count, failed, read = len(self._records), self._failed, self._read
        if new and count <= _NAMED:
            logger.warning("skipped a broken image: %s: %s", name, reason)
            if count == _NAMED:
                logger.warning("%d broken images: further ones are only counted", count)
        if failed > _JUDGED_FROM and failed > self.max_share * read:
            raise RunError(
                f"{failed} of {read} images read were broken ({failed / read:.1%}, the last: {name}: {reason}), more "
                f"than config.data.max_broken_share={self.max_share:g} allows: repair the data, or raise that field"
            )


class Examples:
    """Position -> example, the same in every process and thread.

    Args:
      source: of the records.
      config: `config.data`.
      inputs: the arrays to make of each record, by name.
      seed: of order, crops and whatever the inputs draw.
      global_batch: examples in a global batch.
      broken: counts the records that are read.
    """

    def __init__(
        self, source: Source, config, inputs: Mapping[str, Input], seed: int, global_batch: int, broken: Broken
    ):
        self._source, self._broken, self._seed, self._global_batch = source, broken, seed, global_batch
        self._locate = getattr(source, "locate", int)  # A mixture has some records in several slots.
        self._memory = images.Memory(int(config.decode_gib * 2**30))
        self._reading: dict[int, tuple[str, float]] = {}  # By thread: the record that it reads, and since when.
        self._scale, self._ratio = tuple(config.crop.scale), tuple(config.crop.ratio)
        self._needs_text = any(i.needs_text for i in inputs.values())
        self._make = {name: i.open(config) for name, i in inputs.items()}
        # grain shuffles epoch e by seed + e: with neighbouring seeds one run would repeat the other's orders.
        shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self._order = grain.MapDataset.range(len(source)).shuffle(shuffle_seed).repeat()
        self._order[0]  # grain initialises itself on first use, which threads must not do at once.

    def slowest(self) -> tuple[str, float] | None:
        """(name of the record whose reading has begun first and has not ended, seconds since), or None."""
        found = min(list(self._reading.values()), key=lambda r: r[1], default=None)
        return None if found is None else (found[0], time.monotonic() - found[1])

    def record(self, position: int) -> int:
        """The record at a position."""
        return self._order[position]

    def __call__(self, position: int) -> dict[str, np.ndarray]:
        """{each input's name: its array, "row": int32 [], the row in the global batch}.

        A broken record is replaced by the next good one in the epoch's order.

        Raises:
          RunError: too many records are broken, or all.
        """
        n = len(self._source)
        first, k = position - position % n, position % n
        for step in range(n):
            with contextlib.ExitStack() as memory:
                found = self._read(self.record(first + (k + step) % n), memory)
                if found is not None:
                    image, text = found
                    rng = np.random.default_rng((self._seed, position))
                    box = crop.sample_box(rng, *image.size, self._scale, self._ratio)
                    example = Example(image, text, box, rng)
                    arrays = {name: make(example) for name, make in self._make.items()}
                    return {**arrays, "row": np.int32(position % self._global_batch)}
        raise RunError(f"not one of the {n} images of config.data.path can be read: the log says why")

    def _record(self, i: int) -> Record:
        """Reads record i; what may be the fault of a network or a disk is tried again, a few times."""
        for pause in _PAUSES:
            try:
                return self._source.read(i, with_text=self._needs_text)
            except OSError as e:
                if e.errno not in _TRANSIENT:
                    raise
            time.sleep(pause)
        return self._source.read(i, with_text=self._needs_text)

    def _read(self, i: int, memory: contextlib.ExitStack):
        """(decoded image, text) of record i, or None where it is broken; `memory` holds what it needs."""
        self._reading[threading.get_ident()] = printable(self._source.name(i)), time.monotonic()
        try:
            record = self._record(i)
            if self._needs_text and not (record.text and record.text.strip()):
                raise ValueError("it has no caption")
            memory.enter_context(self._memory.reserve(record.image))
            image = images.decode(record.image)
        except MemoryError as e:
            raise RunError(
                f"memory ran out while {printable(self._source.name(i))} was read: lower config.data.threads, "
                "config.data.prefetch or config.data.decode_gib"
            ) from e
        except Exception as e:  # Pillow raises OSError, SyntaxError, ValueError, zlib.error, ... on bad files.
            self._broken.add(self._locate(i), self._source.name(i), str(e) or type(e).__name__)
            return None
        finally:
            del self._reading[threading.get_ident()]
        self._broken.good()
        return image, record.text


class Iterator:
    """Endless batches of this process's part of each global batch.

    Attributes:
      source: the records; `len(source)` of them make an epoch.
      broken: the counter of broken records.
    """

    def __init__(
        self,
        config,
        source: Source,
        inputs: Mapping[str, Input],
        seed: int,
        global_batch: int,
        process_index: int,
        process_count: int,
    ):
        self.source, self.broken = source, Broken(config.max_broken_share)
        self._examples = Examples(source, config, inputs, seed, global_batch, self.broken)
        self._identity = {"seed": seed, "records": len(source), "global_batch": global_batch}
        self._process = slice(process_index, None, process_count)
        self._local_batch = global_batch // process_count
        buffered = max(config.threads, config.prefetch * self._local_batch) if config.threads else 0
        self._read_options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=buffered)
        self._stall_timeout = config.stall_timeout
        self._consumed = 0
        self._pending: concurrent.futures.Future | None = None  # The next batch, while a thread makes it.
        self._batches = None  # Opened by the first batch: a restored run must not decode from position 0.

    def _open(self):
        first = self._consumed * self._identity["global_batch"]
        positions = grain.MapDataset.range(first, _FOREVER)[self._process]
        examples = positions.map(self._examples).to_iter_dataset(self._read_options)
        return iter(examples.batch(self._local_batch))

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """{each input's name: [b, *shape], "row": int32 [b], rows of the global batch}; b = B / processes.

        Raises:
          RunError: too many records are broken.
        """
        return self.wait()

    def wait(self, leave: Callable[[], bool] = lambda: False) -> dict[str, np.ndarray] | None:
        """The next batch, see `__next__`; None where `leave` becomes true first, and the batch is then the next one.

        A thread waits for the data, so that the caller acts within a second however long a read takes.

        Raises:
          RunError: too many records are broken, or no batch came within config.data.stall_timeout.
        """
        if self._pending is None:
            self._pending = concurrent.futures.Future()
            threading.Thread(target=self._fetch, args=(self._pending,), daemon=True).start()
        began = time.monotonic()
        while not concurrent.futures.wait([self._pending], _LOOK_EVERY).done:
            if leave():
                return None
            if (waited := time.monotonic() - began) > self._stall_timeout:
                name, seconds = self._examples.slowest() or ("none of the records", waited)
                raise RunError(
                    f"no batch for {waited:.0f} s (config.data.stall_timeout={self._stall_timeout:g}), {seconds:.0f} s "
                    f"of them reading {name}: see that the disk or the mount of config.data.path answers"
                )
        batch = self._pending.result()
        self._pending = None
        self._consumed += 1
        return batch

    def _fetch(self, batch: concurrent.futures.Future) -> None:
        try:
            if self._batches is None:
                self._batches = self._open()
            batch.set_result(next(self._batches))
        except BaseException as e:
            batch.set_exception(e)

    def get_state(self) -> dict[str, int]:
        """The position of the run, for JSON: the same in every process, and independent of what was prefetched."""
        return {"batches": self._consumed, **self._identity}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues from where `state` was taken, with any number of processes.

        Raises:
          UserError: it was taken with another seed, batch size or data.
        """
        for field, ours in self._identity.items():
            if state.get(field) != ours:
                raise UserError(
                    f"the checkpoint was written with {_NAMES[field]} {state.get(field)}, this run has {ours}: "
                    "restore that value, or start in another workdir"
                )
        self.close()
        self._consumed = int(state["batches"])

    def close(self) -> None:
        """Stops the threads; the next batch starts them again. Threads in a read that does not end are left there."""
        batches, pending, self._batches, self._pending = self._batches, self._pending, None, None
        if batches is not None and (pending is None or concurrent.futures.wait([pending], _LOOK_EVERY).done):
            batches.close()


_NAMES = {
    "seed": "config.seed =",
    "records": "this many images in config.data.path:",
    "global_batch": "config.batch_size =",
}


# Field of config.data, what must hold, what to do where it does not.
FIELDS = (
    ("image_size", lambda c: c.image_size > 0, "use 1 or more"),
    ("threads", lambda c: c.threads >= 0, "use 0 (no threads) or more"),
    ("prefetch", lambda c: c.prefetch > 0, "use 1 or more"),
    ("stall_timeout", lambda c: 0 < c.stall_timeout < math.inf, "use a number of seconds above 0"),
    ("decode_gib", lambda c: 0 < c.decode_gib < math.inf, "use a number above 0"),
    ("max_broken_share", lambda c: 0 <= c.max_broken_share <= 1, "use 0 to 1"),
    ("crop.scale", lambda c: 0 < c.crop.scale[0] <= c.crop.scale[1] <= 1, "use 0 < low <= high <= 1"),
    ("crop.ratio", lambda c: 0 < c.crop.ratio[0] <= c.crop.ratio[1], "use 0 < narrow <= wide"),
    (
        "crop.interpolation",
        lambda c: c.crop.interpolation in crop.INTERPOLATIONS,
        f"use one of {', '.join(crop.INTERPOLATIONS)}",
    ),
)


def _check(config, inputs: Mapping[str, Input], seed: int, global_batch: int, process_count: int) -> None:
    """Raises a UserError for the first field that is out of range."""
    if not 0 <= seed < 2**32:
        raise UserError(f"config.seed={seed}: use 0 to 2**32 - 1")
    if global_batch < 1:
        raise UserError(f"config.batch_size={global_batch}: use 1 or more")
    if global_batch % process_count:
        raise UserError(
            f"config.batch_size={global_batch} does not divide over {process_count} processes: use a multiple"
        )
    for field, holds, sentence in FIELDS:
        try:
            good = holds(config)
        except (TypeError, ValueError, IndexError):  # Of another type, such as a number in place of a pair.
            good = False
        if not good:
            value = functools.reduce(getattr, field.split("."), config)
            raise UserError(f"config.data.{field}={value!r}: {sentence}")
    if "row" in inputs:
        raise UserError("an input cannot be called 'row', which is the examples' row in the batch: rename it")


def open_batches(
    config,
    inputs: Mapping[str, Input],
    *,
    seed: int,
    global_batch: int,
    process_index: int = 0,
    process_count: int = 1,
    cache_dir=None,
) -> Iterator:
    """Opens the data of a run.

    Args:
      config: `config.data`: `path` (see `sources.open_source`), `crop` (`scale`, `ratio`, `interpolation`), `threads`
        (that decode; 0: decode when asked), `prefetch` (batches), `max_broken_share` (of the records read),
        `decode_gib` (memory of the images decoded at the same time), `stall_timeout` (seconds without a batch).
      inputs: the arrays of a batch by name, see `diva_jax.data.inputs`.
      seed: of order, crops and whatever the inputs draw, 0 to 2**32 - 1.
      global_batch: examples in a batch over all processes.
      process_index, process_count: this process's place.
      cache_dir: folder for the index of tar shards, or None.

    Raises:
      UserError: a field is out of range, there is no data at the path, an input needs captions and the data has
        none, or an input cannot be opened.
    """
    _check(config, inputs, seed, global_batch, process_count)
    source = sources.open_source(config.path, str(cache_dir) if cache_dir else None, quiet=process_index != 0)
    readers = [name for name, i in inputs.items() if i.needs_text]
    if readers and not source.has_text:
        raise UserError(
            f"config.data.path={config.path!r} has no captions, which the input {readers[0]!r} needs: give tar shards "
            "with .txt or .json members, a CSV or parquet file or a Hugging Face dataset with a text column "
            "(PATH?text=COLUMN names it), or images with a .txt file beside each"
        )
    return Iterator(config, source, inputs, seed, global_batch, process_index, process_count)
