"""Records -> batches of uint8 crops: shuffled by one seed, resumable, split over processes.

Images are numbered from the start of the run: position 0, 1, 2, ... One shuffle of all records an epoch, of
`seed` and the epoch alone, says which record stands at a position; the crop depends on (seed, position)
alone. Global batch b of B images is positions b*B .. (b+1)*B - 1, and process p of P takes every P-th of
them from the p-th on, so that any number of processes together see the same images in the same rows.
"""

import logging
import threading

import grain
import numpy as np

from diva_jax.common.errors import RunError, UserError
from diva_jax.data import crop, sources

logger = logging.getLogger(__name__)

_FOREVER = 2**62  # Positions; no run comes near.
_NAMED = 20  # Broken images named in the log before it only counts.
_JUDGED_FROM = 10  # Broken reads below which a share says too little: the first image may be a broken one.


class Broken:
    """Counts the images that could not be read; shared by all decoding threads.

    Args:
      max_share: of the images read; past it `add` raises.

    Attributes:
      count: broken images, each record once.
    """

    def __init__(self, max_share: float):
        self.max_share = max_share
        self._lock = threading.Lock()
        self._read = self._failed = 0
        self._records: set[int] = set()

    @property
    def count(self) -> int:
        return len(self._records)

    def good(self) -> None:
        """One image was read."""
        with self._lock:
            self._read += 1

    def add(self, record: int, name: str, reason: str) -> None:
        """One image could not be read; named in the log the first time.

        Raises:
          RunError: there are too many.
        """
        with self._lock:
            self._read += 1
            self._failed += 1
            new = record not in self._records
            self._records.add(record)
            count, failed, read = len(self._records), self._failed, self._read
        if new and count <= _NAMED:
            logger.warning("skipped a broken image: %s: %s", name, reason)
            if count == _NAMED:
                logger.warning("%d broken images: from here on they are only counted", count)
        if failed > _JUDGED_FROM and failed > self.max_share * read:
            raise RunError(
                f"{failed} of {read} images read were broken ({failed / read:.1%}, the last: {name}: {reason}), more "
                f"than config.data.max_broken_share={self.max_share:g} allows: mend the data, or raise that field"
            )


class Examples:
    """Position -> example, the same in every process and thread.

    Args:
      source: of encoded images.
      config: with `image_size` and `crop`, as in `build`.
      seed: of order and crops.
      global_batch: images in a global batch.
      broken: told of every image read.
    """

    def __init__(self, source: sources.Source, config, seed: int, global_batch: int, broken: Broken):
        self._source, self._broken, self._seed, self._global_batch = source, broken, seed, global_batch
        self._size, self._interpolation = config.image_size, config.crop.interpolation
        self._scale, self._ratio = tuple(config.crop.scale), tuple(config.crop.ratio)
        # grain shuffles epoch e by seed + e: of neighbouring seeds one would lag the other by an epoch.
        shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self._order = grain.MapDataset.range(len(source)).shuffle(shuffle_seed).repeat()
        self._order[0]  # grain sets its bookkeeping up on first use, which threads must not do at once.

    def record(self, position: int) -> int:
        """Which record stands at a position."""
        return self._order[position]

    def __call__(self, position: int) -> dict[str, np.ndarray]:
        """{"image": uint8 [S, S, 3], "row": int32 [], its row in the global batch}.

        A broken image gives way to the next good one in the epoch's order.

        Raises:
          RunError: too many images are broken, or all.
        """
        n = len(self._source)
        first, k = position - position % n, position % n
        for step in range(n):
            image = self._read(self.record(first + (k + step) % n))
            if image is not None:
                rng = np.random.default_rng((self._seed, position))
                box = crop.sample_box(rng, *image.size, self._scale, self._ratio)
                pixels = crop.resized_crop(image, box, self._size, self._interpolation)
                return {"image": pixels, "row": np.int32(position % self._global_batch)}
        raise RunError(f"not one of the {n} images of config.data.path can be read: look at the log for why")

    def _read(self, record: int):
        """The decoded image, or None where it is broken."""
        try:
            image = crop.decode(self._source.read(record)[1])
        except Exception as e:  # Pillow raises OSError, SyntaxError, ValueError, zlib.error, ... on bad files.
            self._broken.add(record, self._source.name(record), str(e) or type(e).__name__)
            return None
        self._broken.good()
        return image


class Iterator:
    """Endless batches of this process's part of each global batch.

    Attributes:
      source: the records; `len(source)` images make an epoch.
      broken: the counter of broken images.
    """

    def __init__(
        self, config, source: sources.Source, seed: int, global_batch: int, process_index: int, process_count: int
    ):
        self.source, self.broken = source, Broken(config.max_broken_share)
        self._examples = Examples(source, config, seed, global_batch, self.broken)
        self._identity = {"seed": seed, "records": len(source), "global_batch": global_batch}
        self._process = slice(process_index, None, process_count)
        self._local_batch = global_batch // process_count
        buffered = max(config.threads, config.prefetch * self._local_batch) if config.threads else 0
        self._read_options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=buffered)
        self._consumed = 0
        self._batches = None  # Opened by the first batch: a restored run must not decode from position 0.

    def _open(self):
        first = self._consumed * self._identity["global_batch"]
        positions = grain.MapDataset.range(first, _FOREVER)[self._process]
        examples = positions.map(self._examples).to_iter_dataset(self._read_options)
        return iter(examples.batch(self._local_batch))

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """{"image": uint8 [b, S, S, 3], "row": int32 [b]}: rows of the global batch, b = B / processes.

        Raises:
          RunError: too many images are broken.
        """
        if self._batches is None:
            self._batches = self._open()
        batch = next(self._batches)
        self._consumed += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Where the run stands: JSON-able, the same in every process, whatever was prefetched."""
        return {"batches": self._consumed, **self._identity}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on where `state` was taken; with any number of processes.

        Raises:
          UserError: it was taken with another seed, batch size or data.
        """
        for field, ours in self._identity.items():
            if state.get(field) != ours:
                raise UserError(
                    f"the checkpoint was written with {_NAMES[field]} {state.get(field)}, this run has {ours}: "
                    "set it back, or start in another workdir"
                )
        self.close()
        self._consumed = int(state["batches"])

    def close(self) -> None:
        """Stops the threads; the next batch starts them again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


_NAMES = {
    "seed": "config.seed =",
    "records": "this many images in config.data.path:",
    "global_batch": "config.batch_size =",
}


def _check(config, seed: int, global_batch: int, process_count: int) -> None:
    """Raises a UserError for the first field that cannot be."""
    (low, high), (narrow, wide) = config.crop.scale, config.crop.ratio
    known = crop.INTERPOLATIONS
    for ok, complaint in (
        (0 <= seed < 2**32, f"config.seed={seed}: use 0 to 2**32 - 1"),
        (global_batch > 0, f"config.batch_size={global_batch}: use 1 or more"),
        (
            global_batch % process_count == 0,
            f"config.batch_size={global_batch} does not divide over {process_count} processes: use a multiple",
        ),
        (config.image_size > 0, f"config.data.image_size={config.image_size}: use 1 or more"),
        (config.threads >= 0, f"config.data.threads={config.threads}: use 0 (no threads) or more"),
        (config.prefetch > 0, f"config.data.prefetch={config.prefetch}: use 1 or more"),
        (0 <= config.max_broken_share <= 1, f"config.data.max_broken_share={config.max_broken_share}: use 0 to 1"),
        (0 < low <= high <= 1, f"config.data.crop.scale={(low, high)}: use 0 < low <= high <= 1"),
        (0 < narrow <= wide, f"config.data.crop.ratio={(narrow, wide)}: use 0 < narrow <= wide"),
        (
            config.crop.interpolation in known,
            f"config.data.crop.interpolation={config.crop.interpolation!r}: use one of {', '.join(known)}",
        ),
    ):
        if not ok:
            raise UserError(complaint)


def build(
    config,
    *,
    seed: int,
    global_batch: int,
    process_index: int = 0,
    process_count: int = 1,
    cache_dir=None,
) -> Iterator:
    """Opens the data of a run.

    Args:
      config: `path` (see `sources.open_source`), `image_size` (the crop's side, pixels), `crop` (`scale`,
        `ratio`, `interpolation`), `threads` (that decode; 0: decode when asked), `prefetch` (batches),
        `max_broken_share` (of the images read).
      seed: of order and crops, 0 to 2**32 - 1.
      global_batch: images in a batch over all processes.
      process_index, process_count: this process's place.
      cache_dir: folder for the index of tar shards, or None.

    Raises:
      UserError: a field is out of range, or there is no data at the path.
    """
    _check(config, seed, global_batch, process_count)
    source = sources.open_source(config.path, str(cache_dir) if cache_dir else None, quiet=process_index != 0)
    return Iterator(config, source, seed, global_batch, process_index, process_count)
