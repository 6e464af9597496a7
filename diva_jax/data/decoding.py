"""Decoded records, with the memory that they need and a count of those that cannot be read."""

import contextlib
import errno
import logging
import threading
import time
from collections.abc import Sequence

import numpy as np
from PIL.Image import Image

from diva_jax.common.errors import RunError, printable
from diva_jax.data import images
from diva_jax.data.alternatives import Alternatives
from diva_jax.data.records import Record, Source

logger = logging.getLogger(__name__)

# Before a read that failed is tried again.
_RETRY_PAUSES_S = (0.2, 1.0, 5.0)
# Numbers of errors that say nothing of the data: of networks, of disks, and of a lack of memory or descriptors.
_TRANSIENT = frozenset(
    getattr(errno, name)
    for name in "EIO EAGAIN EINTR ESTALE ETIMEDOUT ENETDOWN ENETUNREACH EHOSTDOWN EHOSTUNREACH ECONNRESET ECONNABORTED "
    "ECONNREFUSED ENOTCONN EPIPE ENOMEM EMFILE ENFILE EREMOTEIO".split()
)
# Broken images that the log names; further ones are only counted.
_MAX_NAMED = 20
_MAX_REASON = 300  # Characters.
# The share of broken images is judged where there are more than these, since the first image may be a broken one.
_MAX_UNJUDGED = 10


class Broken:
    """Counts the records that could not be read, each once, for all decoding threads."""

    def __init__(self, max_share: float):
        self.max_share = max_share
        self._lock = threading.Lock()
        self._read = self._failed = 0
        self._records: set = set()
        self.skipped = 0

    @property
    def count(self) -> int:
        return len(self._records)

    def good(self) -> None:
        """Counts a record that was read."""
        with self._lock:
            self._read += 1

    def add(self, record, name: str, reason: str) -> None:
        """Counts a record, a number or anything hashable; the first time, the log names it. A RunError where the share
        of broken ones among those read is above `max_share`."""
        name, reason = printable(name), printable(" ".join(reason.split())[:_MAX_REASON])
        with self._lock:
            self._read += 1
            self._failed += 1
            new = record not in self._records
            self._records.add(record)
            count, failed, read = len(self._records), self._failed, self._read
        if new and count <= _MAX_NAMED:
            logger.warning("skipped a broken image: %s: %s", name, reason)
            if count == _MAX_NAMED:
                logger.warning("%d broken images: further ones are only counted", count)
        if failed > _MAX_UNJUDGED and failed > self.max_share * read:
            raise RunError(
                f"{failed} of {read} images read were broken ({failed / read:.1%}, the last: {name}: {reason}), more "
                f"than config.data.max_broken_share={self.max_share:g} allows: repair the data, or raise that field"
            )

    def skip(self, name: str) -> None:
        """Counts a record that has no texts to choose between; the log names the first."""
        with self._lock:
            self.skipped += 1
            first = self.skipped == 1
        if first:
            logger.warning(
                "skipped an image without texts that differ in one fact: %s; further ones are only counted",
                printable(name),
            )


def read_with(source: Source, i: int, with_text: bool, choices: Sequence[Alternatives]) -> Record:
    """Record i with its caption and list `texts` where they are wanted; see `Source.read`."""
    record = source.read(i, with_text=with_text or bool(choices))
    if record.texts is None and any(choice.listed for choice in choices) and hasattr(source, "texts"):
        return record._replace(texts=source.texts(i))
    return record


class Decoder:
    """Reads and decodes records, from any number of threads."""

    def __init__(self, source: Source, config, with_text: bool, broken: Broken, choices: Sequence[Alternatives] = ()):
        self._source, self._with_text, self._broken, self._choices = source, with_text, broken, choices
        self._locate = getattr(source, "locate", int)  # A mixture has some records in several slots.
        self._memory = images.Memory(int(config.decode_gib * 2**30))
        self._reading: dict[int, tuple[str, float]] = {}  # By thread: the record that it reads, and since when.

    def slowest(self) -> tuple[str, float] | None:
        """(name of the record whose reading has begun first and has not ended, seconds since), or None."""
        first = min(list(self._reading.values()), key=lambda r: r[1], default=None)
        return first and (first[0], time.monotonic() - first[1])

    def broken(self, i: int, reason: str) -> None:
        """Counts record i as broken; raises a RunError where too many are."""
        self._broken.add(self._locate(i), self._source.name(i), reason)

    def _record(self, i: int) -> Record:
        """Reads record i; what may be the fault of a network or a disk is tried again, a few times."""
        for pause in _RETRY_PAUSES_S:
            try:
                return read_with(self._source, i, self._with_text, self._choices)
            except OSError as e:
                if e.errno not in _TRANSIENT:
                    raise
            time.sleep(pause)
        return read_with(self._source, i, self._with_text, self._choices)

    def read(self, i: int, memory: contextlib.ExitStack) -> tuple[Image, Record] | None:
        """(decoded image, record i), or None where it is broken; `memory` holds what it needs. A RunError where too
        many records are broken, or memory ran out."""
        self._reading[threading.get_ident()] = printable(self._source.name(i)), time.monotonic()
        try:
            record = self._record(i)
            if self._with_text and not (record.text and record.text.strip()):
                raise ValueError("it has no caption")
            if not all(choose(record, np.random.default_rng(0)) for choose in self._choices):
                self._broken.skip(record.name)
                return None
            memory.enter_context(self._memory.reserve(record.image))
            image = images.decode(record.image)
        except MemoryError as e:
            raise RunError(
                f"memory ran out while {printable(self._source.name(i))} was read: lower config.data.threads, "
                "config.data.prefetch or config.data.decode_gib"
            ) from e
        except Exception as e:  # Pillow raises OSError, SyntaxError, ValueError, zlib.error, ... on bad files.
            self.broken(i, str(e) or type(e).__name__)
            return None
        finally:
            del self._reading[threading.get_ident()]
        self._broken.good()
        return image, record
