"""Caches of what frozen models make: what it depends on, and the work of `python -m diva_jax.cache_latents`."""

import contextlib
import itertools
import math
import shlex
import shutil
from collections.abc import Iterator

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diva_jax.common import log, paths
from diva_jax.common.errors import RunError, UserError, explained, listing
from diva_jax.common.fields import differences
from diva_jax.data import images, latent_cache, pipeline
from diva_jax.data.inputs import Example
from diva_jax.data.latent_cache import DTYPE, FILE, Cache, Entry, Manifest, is_complete, write_shard
from diva_jax.training import distributed, workdirs
from diva_jax.training.step import Program
from diva_jax.weights import formats, origins


def described(program: Program) -> tuple[dict, dict[str, tuple[int, ...]], bool]:
    """(what a program's cache depends on beside the records and the boxes of the crops, for JSON; the shapes of what is
    cached; whether captions are among what it is made of)."""
    found, cacheable = {}, program.objective.cacheable
    for name, wanted in cacheable.items():
        files = [file for part in wanted.parts.values() for file in part.open().tensors.files]
        found[name] = {**wanted.facts, "weights": formats.fingerprint(files)}
        if wanted.tokenizer:
            files = origins.tokenizer_files(paths.expanded(wanted.tokenizer()))
            found[name]["tokenizer"] = formats.fingerprint(files)
    found = found["moments"] if list(found) == ["moments"] else found
    facts, shapes = {**found, "crop": program.config.data.crop.to_dict()}, {n: w.shape for n, w in cacheable.items()}
    return facts, shapes, any("caption" in w.reads for w in cacheable.values())


def open_cache(program: Program) -> Cache | None:
    """The cache that `config.data.latents` names, if any; a UserError where it is not one of this config."""
    path = program.config.data.latents
    return Cache(path, *described(program)) if path else None


class Builder:
    """Writes a cache of latents, or what is missing of it. Each process writes every P-th shard of `per_shard` images.
    `out` is one local or mounted folder for all processes; `batch` images are encoded by a device at the same time. A
    UserError where there is nothing to cache, the config or the data is invalid, or `out` holds another cache."""

    def __init__(self, config, out: str, crops: int, per_shard: int, batch: int):
        self.folder = paths.local(out, "--out")
        self.config, self._named = config, f"--out={out}"
        if config.data.latents:
            raise UserError("config.data.latents is set, but this command makes a cache: leave it empty")
        # Each process encodes alone: no image of one is needed by another.
        devices = np.asarray(jax.local_devices()).reshape(-1, 1)
        self.program = Program(config, Mesh(devices, ("data", "fsdp")))
        if not self.program.objective.cacheable:
            raise UserError(f"config.objective={config.objective} has no frozen model whose outputs could be cached")
        read = {name for wanted in self.program.objective.cacheable.values() for name in wanted.reads}
        self._inputs = {name: i for name, i in self.program.objective.inputs.items() if name in read}
        data = config.data
        self._source = pipeline.open_records(data, self._inputs)
        self._make = {name: i.open(data) for name, i in self._inputs.items()}
        self._batch = batch * len(devices)
        facts, shapes, self._with_text = described(self.program)
        counts = dict(records=len(self._source), crops=crops, seed=config.seed, per_shard=per_shard)
        whole = shapes["moments"] if list(shapes) == ["moments"] else (1, 1, sum(map(math.prod, shapes.values())))
        self.manifest = Manifest(facts=facts, shape=whole, **counts)
        there = Manifest.read(self.folder, "--out")
        if there is not None and there.fingerprint != self.manifest.fingerprint:
            wrong = differences(vars(there), vars(self.manifest))
            raise UserError(f"{self._named} holds another cache: {listing(wrong, 3)}; use another folder")
        self._decoder = pipeline.Decoder(self._source, config.data, self._with_text)
        distributed.check_same({"the fingerprint of the cache": self.manifest.fingerprint})
        self.mine = range(jax.process_index(), self.manifest.shards, jax.process_count())  # The shards of this process.

    def _prepare(self) -> list[int]:
        """Creates the folder and its manifest; returns the shards that this process has to write."""
        m, missing = self.manifest, []
        with explained(f"{self._named} cannot be written", "use a folder that you may write"):
            self.folder.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                paths.write_whole(self.folder / FILE, m.text())
            for shard in self.mine:
                path = self.folder / m.file(shard)
                if not is_complete(path, len(m.range(shard)) * m.crops):
                    missing.append(shard)
                    for leftover in self.folder.glob(f"{path.name}.*.tmp"):  # A killed process has left it.
                        leftover.unlink()
            free = shutil.disk_usage(self.folder).free
        needed = sum(m.shard_bytes(s) for s in missing)
        if needed > free:
            crops = f"{m.records:,} images x {m.crops} crops, and {free / 2**30:.2f} GiB are free there"
            problem = f"{self._named} needs {needed / 2**30:.2f} GiB more for {crops}"
            raise UserError(f"{problem}: use a larger disk, or fewer --crops")
        seen = workdirs.seen(self.folder / FILE)
        distributed.check_same({"the manifest in --out, which must be one folder for all processes": seen})
        kept = [m.range(s).start for s in self.mine if s not in missing][: latent_cache.PROBED]
        with explained(f"{self._named} holds another cache", "use another folder", UserError):
            Cache(str(self.folder), m.facts, None, self._with_text).check(self._source, kept)
        return missing

    def _crops(self, record: int) -> list[tuple[Entry, dict[str, np.ndarray] | None]]:
        """(entry without moments, its inputs) of each crop of a record; the inputs are None where it is broken."""
        m, settings = self.manifest, self.config.data.crop
        with contextlib.ExitStack() as memory:
            found = self._decoder.read(record, memory)
            if found is None:
                return [(Entry(record, k, 0, (0, 0, 0, 0), None), None) for k in range(m.crops)]
            (image, encoded), rows = found, []
            crc = latent_cache.checksum(encoded, self._with_text)
            for k, position in enumerate(self._where[:, record]):
                rng = np.random.default_rng((m.seed, int(position)))
                box = images.sample_box(rng, *image.size, tuple(settings.scale), tuple(settings.ratio))
                arrays = {name: make(Example(image, encoded.text, box, rng)) for name, make in self._make.items()}
                rows.append((Entry(record, k, crc, box, None), arrays))
            return rows

    def _encoder(self):
        """A function: batch on the host -> [B, *shape of an entry] on the devices, while the host goes on."""
        program, shape = self.program, self.manifest.shape
        prefixes = [f"{prefix}/" for wanted in program.objective.cacheable.values() for prefix in wanted.parts]
        names = [n for n in program.arrays if n.startswith(tuple(prefixes))]
        arrays, _ = workdirs.initial_arrays(program, names, every_source=False)
        absent = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in program.arrays.items()}

        def outputs(arrays, batch):
            with program.tracing():
                wanted = program.skeleton.merge(absent, arrays).cacheable.values()
                rows = [w.make(batch).astype(DTYPE).reshape(self._batch, -1) for w in wanted]
                return jnp.concatenate(rows, axis=1).reshape(self._batch, *shape)

        compiled = jax.jit(outputs, out_shardings=program.batch_sharding)
        return lambda batch: compiled(arrays, jax.device_put(batch, program.batch_sharding))

    def _entries(self, shard: int) -> Iterator[Entry]:
        """The entries of a shard, whose batches hold no other shard's, so that it is the same whenever it is made."""
        data, records = self.config.data, self.manifest.range(shard)
        ahead = max(data.threads, 2 * self._batch // self.manifest.crops) if data.threads else 0
        options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=ahead)
        wanted = grain.MapDataset.range(records.start, records.stop).map(lambda i: self._crops(int(i)))
        rows, pending = [None], []  # (rows, moments on the devices): one batch is encoded while the next is decoded.
        with contextlib.closing(iter(wanted.to_iter_dataset(options))) as found:
            crops = itertools.chain.from_iterable(found)
            while rows or pending:
                if rows := list(itertools.islice(crops, self._batch)):
                    batch = {name: np.zeros((self._batch, *i.shape), i.dtype) for name, i in self._inputs.items()}
                    for row, (_, arrays) in enumerate(rows):
                        for name, array in (arrays or {}).items():
                            batch[name][row] = array
                    pending.append((rows, self._encode(batch)))
                if len(pending) > bool(rows):
                    done, moments = pending.pop(0)
                    for (entry, arrays), value in zip(done, np.asarray(moments), strict=False):
                        yield entry if arrays is None else entry._replace(moments=value)
                    self._progress.update(len(done))

    def run(self) -> None:
        """Writes all shards that are missing. A UserError where the folder cannot be written, is too small, or is not
        the same one for all processes; a RunError where too many images are broken, or a shard cannot be written."""
        m, missing = self.manifest, self._prepare()
        size = sum(map(m.shard_bytes, range(m.shards))) / 2**30
        log.say(
            f"{m.records:,} images x {m.crops} crops in {m.shards} shards, {size:.3g} GiB, in {self.folder}; "
            f"{len(missing)} of this process's {len(self.mine)} shards are to be made"
        )
        if missing:
            # Where a run with the config's seed has each record in each epoch, [crops, records].
            order, self._where = pipeline.shuffled(m.records, m.seed), np.empty((m.crops, m.records), np.int64)
            for position in range(self._where.size):
                self._where[position // m.records, order[position]] = position
            self._encode = self._encoder()
        advice = "see that it can be written and has space; the same command goes on after the last complete shard"
        with log.progress("encoding", sum(len(m.range(s)) for s in missing) * m.crops, "crops") as self._progress:
            for shard in missing:
                with explained(f"{self._named}: {m.file(shard)} cannot be written", advice, kind=RunError):
                    write_shard(self.folder, m.file(shard), self._entries(shard))
        distributed.check_same({"the cache": m.fingerprint})  # All processes are done.
        broken = f"; {self._decoder.count} broken images have none" if self._decoder.count else ""
        log.say(f"done{broken}; train with --config.data.latents={shlex.quote(str(self.folder))}")
