"""Records -> batches of the arrays that an objective asks for: shuffled by one seed, resumable, split over processes.

Examples are numbered from the start of the run: position 0, 1, 2, ... Each epoch is one shuffle of all records, by
(seed, epoch) alone; crops and other random choices depend on (seed, position) alone. Global batch b of B examples is
positions b*B .. (b+1)*B - 1, and process p of P takes every P-th of them from the p-th on, so that any number of
processes together see the same examples in the same rows.
"""

import concurrent.futures
import contextlib
import errno
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import grain
import numpy as np
from PIL.Image import Image

from diva_jax.common.errors import RunError, UserError, brief, printable
from diva_jax.data import images, latent_cache, sources
from diva_jax.data.inputs import Alternatives, Example, Input
from diva_jax.data.sources import Record, Source

logger = logging.getLogger(__name__)

# Pauses before each new try of a read that failed.
_RETRY_PAUSES_S = (0.2, 1.0, 5.0)
# Error numbers that do not mean broken data: those of networks, of disks, and of a lack of memory or descriptors.
_TRANSIENT = frozenset(
    getattr(errno, name)
    for name in "EIO EAGAIN EINTR ESTALE ETIMEDOUT ENETDOWN ENETUNREACH EHOSTDOWN EHOSTUNREACH ECONNRESET ECONNABORTED "
    "ECONNREFUSED ENOTCONN EPIPE ENOMEM EMFILE ENFILE EREMOTEIO".split()
)
# Broken images that the log names; further ones are only counted.
_MAX_NAMED = 20
_MAX_REASON = 300  # Characters.
# The share of broken images is checked once there are more than these, since the first image may be a broken one.
_MAX_UNJUDGED = 10
# A larger position than that of any run.
_MAX_POSITION = 2**62
# Time between two checks whether a wait should end.
_POLL_INTERVAL_S = 0.5
# Number of records in which texts to choose between are looked for before a run.
_PROBED = 256


def read_with(source: Source, i: int, with_text: bool, choices: Sequence[Alternatives]) -> Record:
    """Record i with its caption and list `texts` where they are wanted; see `Source.read`."""
    record = source.read(i, with_text=with_text or bool(choices))
    if record.texts is None and any(choice.listed for choice in choices) and hasattr(source, "texts"):
        return record._replace(texts=source.texts(i))
    return record


class Decoder:
    """Reads and decodes records, from any number of threads; those that could not be read are counted, each once."""

    def __init__(self, source: Source, config, with_text: bool, choices: Sequence[Alternatives] = ()):
        self._source, self._with_text, self._choices = source, with_text, choices
        self._locate = getattr(source, "locate", int)  # A mixture has some records in several slots.
        self._memory = images.Memory(int(config.decode_gib * 2**30))
        self._reading: dict[int, tuple[str, float]] = {}  # By thread: the record that it reads, and since when.
        self._max_share, self._lock, self._records = config.max_broken_share, threading.Lock(), set()
        self._read = self._failed = 0
        self.count = self.skipped = 0  # Numbers of broken records, and of those without texts to choose between.

    def slowest(self) -> tuple[str, float] | None:
        """(name of the record whose reading has begun first and has not ended, seconds since), or None."""
        first = min(list(self._reading.values()), key=lambda r: r[1], default=None)
        return first and (first[0], time.monotonic() - first[1])

    def broken(self, i: int, reason: str) -> None:
        """Counts record i as broken; the first time, the log names it. A RunError where the share of broken ones among
        those read is above config.data.max_broken_share."""
        name, reason = printable(self._source.name(i)), printable(" ".join(reason.split())[:_MAX_REASON])
        with self._lock:
            self._read += 1
            self._failed += 1
            before = self.count
            self._records.add(self._locate(i))
            self.count = len(self._records)
            count, failed, read = self.count, self._failed, self._read
        if before < count <= _MAX_NAMED:
            logger.warning("skipped a broken image: %s: %s", name, reason)
            if count == _MAX_NAMED:
                logger.warning("%d broken images: further ones are only counted", count)
        if failed > _MAX_UNJUDGED and failed > self._max_share * read:
            problem = f"{failed} of {read} images read were broken ({failed / read:.1%}, the last: {name}: {reason})"
            allowed = f"more than config.data.max_broken_share={self._max_share:g} allows"
            raise RunError(f"{problem}, {allowed}: repair the data, or raise that field")

    def read(self, i: int, memory: contextlib.ExitStack) -> tuple[Image, Record] | None:
        """(decoded image, record i), or None where it is broken or has no texts to choose between; `memory` holds what
        it needs. A RunError where too many records are broken, or memory ran out."""
        self._reading[threading.get_ident()] = printable(self._source.name(i)), time.monotonic()
        try:
            for pause in (*_RETRY_PAUSES_S, None):  # What may be the fault of a network or a disk is tried again.
                try:
                    record = read_with(self._source, i, self._with_text, self._choices)
                    break
                except OSError as e:
                    if e.errno not in _TRANSIENT or pause is None:
                        raise
                time.sleep(pause)
            if self._with_text and not (record.text and record.text.strip()):
                raise ValueError("it has no caption")
            if not all(choose(record, np.random.default_rng(0)) for choose in self._choices):
                with self._lock:
                    self.skipped += 1
                    first = self.skipped == 1
                if first:
                    said = "skipped an image without texts that differ in one fact: %s; further ones are only counted"
                    logger.warning(said, printable(record.name))
                return None
            memory.enter_context(self._memory.reserve(record.image))
            image = images.decode(record.image)
        except MemoryError as e:
            advice = "lower config.data.threads, config.data.prefetch or config.data.decode_gib"
            raise RunError(f"memory ran out while {printable(self._source.name(i))} was read: {advice}") from e
        except Exception as e:  # Pillow raises OSError, SyntaxError, ValueError, zlib.error, ... on bad files.
            self.broken(i, str(e) or type(e).__name__)
            return None
        finally:
            del self._reading[threading.get_ident()]
        with self._lock:
            self._read += 1
        return image, record


def shuffled(records: int, seed: int) -> grain.MapDataset:
    """The record at each position of a run with this seed."""
    # grain shuffles epoch e by seed + e: with neighbouring seeds one run would repeat the other's orders.
    order = grain.MapDataset.range(records).shuffle(int(np.random.SeedSequence(seed).generate_state(1)[0])).repeat()
    order[0]  # grain initialises itself on first use, which threads must not do at once.
    return order


def open_records(config, inputs: Mapping[str, Input], index: str | None = None) -> Source:
    """The records of `config.data`, see `sources.open_source`; a UserError where captions are needed and missing."""
    source = sources.open_source(config.path, index, allow_urls=config.allow_urls)
    readers = [name for name, i in inputs.items() if i.needs_text]
    if readers and not source.has_text:
        raise UserError(
            f"config.data.path={config.path!r} has no captions, which the input {readers[0]!r} needs: give tar shards "
            "with .txt or .json members, a CSV or parquet file or a Hugging Face dataset with a text column "
            "(PATH?text=COLUMN names it), or images with a .txt file beside each"
        )
    return source


_NAMES = {
    "seed": "config.seed =",
    "records": "this many images in config.data.path:",
    "global_batch": "config.batch_size =",
    "latents": "the cache config.data.latents with the fingerprint",
}


class Batches:
    """Endless batches of this process's `rows`, all by default, of each global batch of `config.data`, `global_batch`
    examples over all processes, each with the arrays `inputs` by name (see `diva_jax.data.inputs`). `seed` is of order,
    crops and whatever the inputs draw. The index of tar shards is kept in `cache_dir`; `cache` has the crop boxes, and
    the outputs of frozen models. A UserError where there is no data, an input needs captions or texts and the data has
    none, or the cache is of other data."""

    def __init__(
        self,
        config,
        inputs: Mapping[str, Input],
        *,
        seed: int,
        global_batch: int,
        rows: Sequence[int] | None = None,
        cache_dir=None,
        cache: latent_cache.Cache | None = None,
    ):
        if "row" in inputs:
            raise UserError("an input cannot be called 'row', which is the examples' row in the batch: rename it")
        source = open_records(config, inputs, str(cache_dir) if cache_dir else None)
        choices = list(dict.fromkeys(i.alternatives for i in inputs.values() if hasattr(i, "alternatives")))
        for choice in choices:
            why = ""
            for i in range(0, len(source), -(-len(source) // _PROBED)):
                try:
                    if choice(read_with(source, i, True, (choice,)), np.random.default_rng(0)):
                        break
                except (OSError, ValueError) as e:
                    why = f" ({printable(source.name(i))}: {brief(e)})"
            else:
                problem = f"config.data.path={config.path!r}: not one of {min(len(source), _PROBED)} records has"
                advice = "give it to them, or set config.judge.texts to another kind"
                raise UserError(f"{problem} {choice.wanted}{why}: {advice}")
        if cache is not None:
            cache.check(source)
        self.source, self._cache, self._order, n = source, cache, shuffled(len(source), seed), len(source)
        # Steps of this size (of the golden ratio, without a common divisor) reach all records, at first distant ones.
        self._stride = next(s for s in itertools.count(int(0.618 * n) + 1) if math.gcd(s, n) == 1)
        self._scale, self._ratio = tuple(config.crop.scale), tuple(config.crop.ratio)
        self.decoder = Decoder(source, config, any(i.needs_text for i in inputs.values()), choices)
        self._make = {name: i.open(config) for name, i in inputs.items()}
        self._identity = {"seed": seed, "records": len(source), "global_batch": global_batch}
        if cache is not None:
            self._identity["latents"] = cache.manifest.fingerprint
        self._rows = range(global_batch) if rows is None else rows
        buffered = max(config.threads, config.prefetch * len(self._rows)) if config.threads else 0
        self._read_options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=buffered)
        self._stall_timeout = config.stall_timeout
        self._consumed = 0
        self._pending: concurrent.futures.Future | None = None  # The next batch, while a thread makes it.
        self._batches = None  # Opened by the first batch: a restored run must not decode from position 0.

    def _at(self, position: int) -> dict[str, np.ndarray]:
        """The arrays of the example at a position, and its "row". A record that cannot be used is replaced by one far
        from it in the epoch's order, so that a batch does not have it twice; a RunError where too many are broken."""
        n, row = len(self.source), {"row": np.int32(position % self._identity["global_batch"])}
        epoch, k = divmod(position, n)
        for step in range(n):
            i = self._order[epoch * n + (k + step * self._stride) % n]
            cached = self._cache.read(i, epoch) if self._cache else None
            if self._cache and cached is None:
                self.decoder.broken(i, "it could not be decoded when config.data.latents was made")
                continue
            with contextlib.ExitStack() as memory:
                if (decoded := self.decoder.read(i, memory)) is None:
                    continue
                image, record = decoded
                rng = np.random.default_rng((self._identity["seed"], position))
                box = images.sample_box(rng, *image.size, self._scale, self._ratio)
                example = Example(image, record.text, box, rng, texts=record.texts)
                if cached:
                    arrays = self._cache.arrays(cached, record, self.source.name(i))
                    example = example._replace(box=cached.box, cached=arrays)
                return {name: make(example) for name, make in self._make.items()} | row
        raise RunError(f"not one of the {n} images of config.data.path can be used: the log says why")

    def _mine(self, k: int) -> dict[str, np.ndarray]:
        """The k-th example of this process, see `_at`."""
        batch, place = divmod(k, len(self._rows))
        return self._at(batch * self._identity["global_batch"] + self._rows[place])

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """{each input's name: [b, *shape], "row": int32 [b], this process's b rows of the global batch}."""
        return self.wait()

    def wait(self, leave: Callable[[], bool] = lambda: False) -> dict[str, np.ndarray] | None:
        """The next batch, see `__next__`; None where `leave` becomes true first, and the batch is then the next one. A
        thread waits for the data, so that the caller acts within a second however long a read takes. A RunError where
        too many records are broken, or no batch came within config.data.stall_timeout."""
        if self._pending is None:
            self._pending = concurrent.futures.Future()
            threading.Thread(target=self._fetch, args=(self._pending,), daemon=True).start()
        began = time.monotonic()
        while not concurrent.futures.wait([self._pending], _POLL_INTERVAL_S).done:
            if leave():
                return None
            if (waited := time.monotonic() - began) > self._stall_timeout:
                name, seconds = self.decoder.slowest() or ("none of the records", waited)
                limit = f"config.data.stall_timeout={self._stall_timeout:g}"
                problem = f"no batch for {waited:.0f} s ({limit}), {seconds:.0f} s of them reading {name}"
                raise RunError(f"{problem}: see that the disk or the mount of config.data.path answers")
        batch = self._pending.result()
        self._pending = None
        self._consumed += 1
        return batch

    def _fetch(self, batch: concurrent.futures.Future) -> None:
        try:
            if self._batches is None:
                here = len(self._rows)
                examples = grain.MapDataset.range(self._consumed * here, _MAX_POSITION).map(self._mine)
                self._batches = iter(examples.to_iter_dataset(self._read_options).batch(here))
            batch.set_result(next(self._batches))
        except BaseException as e:
            batch.set_exception(e)

    def get_state(self) -> dict[str, int]:
        """The position of the run, for JSON: the same in every process, and independent of what was prefetched."""
        return {"batches": self._consumed, **self._identity}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues from where `state` was taken, with any number of processes; a UserError for another run's."""
        for field, ours in self._identity.items():
            if state.get(field) != ours:
                problem = f"the checkpoint was written with {_NAMES[field]} {state.get(field)}, this run has {ours}"
                raise UserError(f"{problem}: restore that value, or start in another workdir")
        self.close()
        self._consumed = int(state["batches"])

    def close(self) -> None:
        """Stops the threads; the next batch starts them again. Threads in a read that does not end are left there."""
        batches, pending, self._batches, self._pending = self._batches, self._pending, None, None
        if batches is not None and (pending is None or concurrent.futures.wait([pending], _POLL_INTERVAL_S).done):
            batches.close()
