"""Embeddings of images and texts over a mesh: batches of a fixed size, the last one padded, on any mesh."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image
from tqdm import tqdm

from diva_jax.common.errors import RunError
from diva_jax.data import images
from diva_jax.data.preprocess import normalise, to_float
from diva_jax.evals import Settings
from diva_jax.evals.encoders import Encoder
from diva_jax.evals.readout import Readout, parse_readout, patch_weights, read_out
from diva_jax.models import backbones
from diva_jax.models.backbones import Spec
from diva_jax.models.backbones.shared.text import Text
from diva_jax.models.layers import abstract
from diva_jax.training import partition, sharding

Array = jax.Array
_READER_THREADS = 16


def unit(x: np.ndarray) -> np.ndarray:
    """Scales [..., D] to length one, in float64."""
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def require_finite(values: np.ndarray, label: str, what: str, kind: str = "embeddings") -> np.ndarray:
    """Returns values [N, ...] of `what`, such as "images"; a RunError, with the weights' label, where they are not
    finite."""
    bad = int((~np.isfinite(values).reshape(len(values), -1).all(axis=1)).sum())
    if bad:
        raise RunError(
            f"{label}: the {kind} of {bad} of {len(values)} {what} are not finite: these weights cannot be evaluated"
        )
    return values


def spread(rows: Sequence[np.ndarray], mesh: Mesh) -> Array:
    """A row for each item of a batch as one global array over all devices; each process gives its own rows."""
    whole = np.stack(rows)
    return jax.make_array_from_callback(whole.shape, NamedSharding(mesh, sharding.BATCH), whole.__getitem__)


def _ahead(read: Callable[[int], Any], batches: Sequence[Sequence[int]]) -> Iterator[dict[int, Any]]:
    """Yields row -> value for each batch, read in threads while the previous batch is in use."""
    with ThreadPoolExecutor(_READER_THREADS) as pool:
        waiting: dict = {}
        try:
            for i in range(len(batches) + 1):
                now = waiting
                waiting = {r: pool.submit(read, r) for r in batches[i]} if i < len(batches) else {}
                if i:
                    yield {r: future.result() for r, future in now.items()}
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class Towers:
    """The two towers of a backbone, compiled once; weights are given with each call, batches are split over the
    mesh."""

    def __init__(self, spec: Spec, mesh: Mesh, settings: Settings):
        self.spec, self.mesh, self.settings = spec, mesh, settings
        self.readout = parse_readout(spec.readout)
        dtype = jnp.dtype(settings.dtype)
        vision = abstract(lambda rngs: backbones.build(spec, rngs=rngs, dtype=dtype))
        self._vision = partition.disassemble(vision)[0]
        devices = mesh.devices.size
        self.batch = -(-settings.batch_size // devices) * devices
        self._rows = NamedSharding(mesh, sharding.BATCH)
        jit = partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
        self._encode_images = jit(self._image_step, static_argnames="readout")
        self._encode_texts = jit(self._text_step)
        self._encode_dense = jit(self._dense_step, static_argnames="last")

    @functools.cached_property
    def _text(self) -> partition.Skeleton:
        """The text tower without its arrays; a UserError if the backbone has none."""
        dtype = jnp.dtype(self.settings.dtype)
        return partition.disassemble(abstract(lambda rngs: Text(self.spec, rngs=rngs, dtype=dtype)))[0]

    def _precision(self):
        # By default TPUs multiply float32 matrices in bfloat16; an evaluation in float32 must not.
        return jax.default_matmul_precision("highest" if self.settings.dtype == "float32" else "default")

    def _normalised(self, pixels: Array) -> Array:
        return normalise(to_float(pixels), self.spec.mean, self.spec.std)

    def _image_step(self, arrays, pixels: Array, weights: Array | None = None, *, readout: Readout | None):
        """uint8 [B, S, S, 3] -> pooled [B, D] and, with a readout, its embeddings [B, K, D]."""
        with self._precision():
            features = self._vision.merge(arrays).encode(self._normalised(pixels))
            out = {"pooled": features.pooled.astype(jnp.float32)}
            if readout is not None:
                out["published"] = read_out(readout, features, weights)
            return out

    def _text_step(self, arrays, ids: Array) -> Array:
        with self._precision():
            return self._text.merge(arrays).encode(ids).astype(jnp.float32)

    def _dense_step(self, arrays, pixels: Array, *, last: str) -> Array:
        """uint8 [B, S, S, 3] -> patch tokens [B, P, D]."""
        with self._precision():
            return self._vision.merge(arrays).encode_dense(self._normalised(pixels), last).astype(jnp.float32)

    def _put(self, rows: Mapping[int, np.ndarray], first: int, count: int, like: jax.ShapeDtypeStruct) -> Array:
        """Returns the batch from row `first` on as a global array, zeros past the end; processes provide their rows."""

        def piece(index):
            take = range(*index[0].indices(self.batch))
            padding = np.zeros(like.shape, like.dtype)
            return np.stack([rows[first + i] if first + i < count else padding for i in take])

        return jax.make_array_from_callback((self.batch, *like.shape), self._rows, piece)

    def _outputs(
        self, step: Callable, read: Callable[[int], tuple], count: int, *like: jax.ShapeDtypeStruct
    ) -> Iterator[Any]:
        """Yields the outputs of a compiled step for items 0..count-1, batch by batch, without the padding. `read` gives
        the arrays of one item, of the shapes `like`; it is called from threads."""
        spans = self._rows.addressable_devices_indices_map((self.batch,)).values()
        mine = sorted({i for (span,) in spans for i in range(*span.indices(self.batch))})
        starts = range(0, count, self.batch)
        batches = [[first + i for i in mine if first + i < count] for first in starts]
        for first, rows in zip(starts, _ahead(read, batches), strict=True):
            columns = [{r: values[k] for r, values in rows.items()} for k in range(len(like))]
            out = step(*(self._put(c, first, count, shape) for c, shape in zip(columns, like, strict=True)))
            yield jax.tree.map(lambda x, first=first: np.asarray(x)[: count - first], out)

    def _pixels(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.spec.image_size, self.spec.image_size, 3), np.uint8)

    def images(
        self, arrays: Mapping[str, Array], read: Callable[[int], Image.Image], count: int, seeds: int = 0
    ) -> dict[str, np.ndarray]:
        """The embeddings of images 0..count-1, which `read` returns in threads: {"pooled": float32 [count, D]} and,
        with seeds, "published": [count, K, D], the spec's readout. K is `seeds` where it draws patches, else 1."""
        spec, readout = self.spec, self.readout if seeds else None
        like = [self._pixels()]
        if readout and readout.patches is not None:
            like.append(jax.ShapeDtypeStruct((seeds if readout.random else 1, spec.patches), np.float32))

        def load(i: int) -> tuple[np.ndarray, ...]:
            pixels = images.prepare(read(i), spec.image_size, spec.resize_mode, spec.interpolation)
            if len(like) == 1:
                return (pixels,)
            return pixels, patch_weights(readout, spec.patches, [i], seeds, self.settings.seed)[0]

        out, step = [], partial(self._encode_images, arrays, readout=readout)
        # A bar appears after half a minute.
        with tqdm(total=count, unit=" images", delay=30, mininterval=30, disable=jax.process_index() > 0) as progress:
            for embeddings in self._outputs(step, load, count, *like):
                out.append(embeddings)
                progress.update(len(embeddings["pooled"]))
        return {k: np.concatenate([o[k] for o in out]) for k in out[0]}

    def dense(
        self, arrays: Mapping[str, Array], read: Callable[[int], np.ndarray], count: int, last: str
    ) -> Iterator[np.ndarray]:
        """Patch tokens of windows 0..count-1, in order, each float32 [P, D], not normalised. `read` gives window i,
        uint8 [S, S, 3], in threads; `last` is how the last block is run, see `models.backbones.shared.dense`."""
        step = partial(self._encode_dense, arrays, last=last)
        for tokens in self._outputs(step, lambda i: (read(i),), count, self._pixels()):
            yield from tokens

    def texts(self, arrays: Mapping[str, Array], ids: np.ndarray) -> np.ndarray:
        """Computes the embeddings of token ids int32 [N, context_length]: float32 [N, D], not normalised."""
        like = jax.ShapeDtypeStruct(ids.shape[1:], ids.dtype)
        return np.concatenate(
            list(self._outputs(partial(self._encode_texts, arrays), lambda i: (ids[i],), len(ids), like))
        )


@dataclasses.dataclass(frozen=True)
class Model:
    """One set of weights, in the form that tasks use, with its label in results; `table` is text -> row of
    `embeddings`, which are those of all texts in `Task.texts`, float32 [T, D], not normalised."""

    label: str
    towers: Towers
    encoder: Encoder
    table: Mapping[str, int]
    embeddings: np.ndarray

    def images(self, read: Callable[[int], Image.Image], count: int, seeds: int = 0) -> dict[str, np.ndarray]:
        """`Towers.images` with these weights; a RunError where an embedding is not finite."""
        out = self.towers.images(self.encoder.vision, read, count, seeds)
        return {key: require_finite(value, self.label, "images") for key, value in out.items()}

    def dense(self, read: Callable[[int], np.ndarray], count: int, last: str) -> Iterator[np.ndarray]:
        """`Towers.dense` with these weights; a RunError where a token is not finite."""
        for tokens in self.towers.dense(self.encoder.vision, read, count, last):
            yield require_finite(tokens, self.label, "patches of a window")

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """The embeddings of some of `Task.texts`, float32 [N, D], not normalised; a RunError where one is not
        finite."""
        return require_finite(self.embeddings[[self.table[t] for t in texts]], self.label, "texts")
