"""Embeddings of images and texts over a mesh: batches of a fixed size, the last one padded, on any mesh."""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image

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
_THREADS = 16
_QUIET = 30.0  # Seconds between progress lines.


def unit(x: np.ndarray) -> np.ndarray:
    """Scales [..., D] to length one, in float64."""
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def require_finite(embeddings: np.ndarray, label: str, what: str) -> np.ndarray:
    """Returns the embeddings, [N, ..., D].

    Raises:
      RunError: some of the N are not finite; gives the label of the weights and how many.
    """
    bad = int((~np.isfinite(embeddings).reshape(len(embeddings), -1).all(axis=1)).sum())
    if bad:
        raise RunError(
            f"{label}: the embeddings of {bad} of {len(embeddings)} {what} are not finite: these weights cannot be "
            "evaluated"
        )
    return embeddings


def _ahead(read: Callable[[int], np.ndarray], batches: Sequence[Sequence[int]]) -> Iterator[dict[int, np.ndarray]]:
    """Yields row -> value for each batch, read in threads while the previous batch is in use."""
    with ThreadPoolExecutor(_THREADS) as pool:
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
    """The two towers of a backbone, compiled once; weights are given with each call.

    Args:
      spec: the backbone.
      mesh: batches are split over all of its devices.
      settings: batch size, seed and dtype.

    Attributes:
      vision: name -> ShapeDtypeStruct of the parameters of the vision tower.
    """

    def __init__(self, spec: Spec, mesh: Mesh, settings: Settings):
        self.spec, self.mesh, self.settings = spec, mesh, settings
        self.readout = parse_readout(spec.readout)
        dtype = jnp.dtype(settings.dtype)
        self._vision, self.vision = partition.disassemble(
            abstract(lambda rngs: backbones.build(spec, rngs=rngs, dtype=dtype))
        )
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

    def _image_step(self, arrays, pixels: Array, weights: Array | None, *, readout: Readout | None):
        """uint8 [B, S, S, 3] -> pooled [B, D] and, with a readout, its embeddings [B, K, D]."""
        with self._precision():
            x = normalise(to_float(pixels), self.spec.mean, self.spec.std)
            features = self._vision.merge(arrays).encode(x)
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
            x = normalise(to_float(pixels), self.spec.mean, self.spec.std)
            return self._vision.merge(arrays).encode_dense(x, last).astype(jnp.float32)

    def _put(self, rows: Mapping[int, np.ndarray], first: int, count: int, example: np.ndarray) -> Array:
        """Returns the batch from row `first` on as a global array, zeros past the end; processes provide their rows."""

        def piece(index):
            take = range(*index[0].indices(self.batch))
            return np.stack([rows[first + i] if first + i < count else np.zeros_like(example) for i in take])

        return jax.make_array_from_callback((self.batch, *example.shape), self._rows, piece)

    def _batches(self, count: int) -> list[list[int]]:
        """Returns the rows of this process, per batch."""
        spans = self._rows.addressable_devices_indices_map((self.batch,)).values()
        mine = sorted({i for (span,) in spans for i in range(*span.indices(self.batch))})
        return [[b + i for i in mine if b + i < count] for b in range(0, count, self.batch)]

    def images(
        self, arrays: Mapping[str, Array], read: Callable[[int], Image.Image], count: int, seeds: int = 0
    ) -> dict[str, np.ndarray]:
        """Computes the embeddings of images 0..count-1.

        Args:
          arrays: the vision tower's parameters by name.
          read: returns image i; called from threads.
          count: the number of images.
          seeds: draws of random patches for the spec's published readout; 0: only the pooled embedding.

        Returns:
          {"pooled": float32 [count, D]} and, with seeds, "published": [count, K, D]; K is `seeds` for a readout that
          draws patches, else 1.
        """
        spec, readout = self.spec, self.readout if seeds else None
        example = np.zeros((spec.image_size, spec.image_size, 3), np.uint8)
        out, began = [], time.monotonic()
        told = began

        def load(i: int) -> np.ndarray:
            return images.prepare(read(i), spec.image_size, spec.resize_mode, spec.interpolation)

        for b, rows in enumerate(_ahead(load, self._batches(count))):
            first = b * self.batch
            weights = None
            if readout and readout.patches is not None:
                own = patch_weights(readout, spec.patches, list(rows), seeds, self.settings.seed)
                per_row = dict(zip(rows, own, strict=True))
                shape = (seeds if readout.random else 1, spec.patches)
                weights = self._put(per_row, first, count, np.zeros(shape, np.float32))
            result = self._encode_images(arrays, self._put(rows, first, count, example), weights, readout=readout)
            out.append({k: np.asarray(v) for k, v in result.items()})
            if time.monotonic() - told > _QUIET and jax.process_index() == 0:
                told, done = time.monotonic(), first + self.batch
                rate = done / (told - began)
                print(f"  {done} of {count} images, {rate:.1f} images/s", file=sys.stderr, flush=True)
        return {k: np.concatenate([o[k] for o in out])[:count] for k in out[0]}

    def dense(
        self, arrays: Mapping[str, Array], read: Callable[[int], np.ndarray], count: int, last: str
    ) -> Iterator[np.ndarray]:
        """Patch tokens of windows 0..count-1, in order, each float32 [P, D], not normalised.

        Args:
          arrays: the vision tower's parameters by name.
          read: window i, uint8 [S, S, 3], called from threads.
          count: the number of windows.
          last: how the last block is run, see `models.backbones.shared.dense`.
        """
        size = self.spec.image_size
        example = np.zeros((size, size, 3), np.uint8)
        for b, rows in enumerate(_ahead(read, self._batches(count))):
            batch = self._put(rows, b * self.batch, count, example)
            yield from np.asarray(self._encode_dense(arrays, batch, last=last))[: count - b * self.batch]

    def texts(self, arrays: Mapping[str, Array], ids: np.ndarray) -> np.ndarray:
        """Computes the embeddings of token ids int32 [N, context_length]: float32 [N, D], not normalised."""
        out = []
        for b, rows in enumerate(self._batches(len(ids))):
            batch = self._put({r: ids[r] for r in rows}, b * self.batch, len(ids), ids[0])
            out.append(np.asarray(self._encode_texts(arrays, batch)))
        return np.concatenate(out)[: len(ids)]


@dataclasses.dataclass(frozen=True)
class Model:
    """One set of weights, in the form that tasks use.

    Attributes:
      label: its name in results.
      towers: the compiled towers.
      encoder: the weights.
      table: text -> row of `embeddings`.
      embeddings: the embeddings of all texts in `Task.texts`, float32 [T, D], not normalised.
    """

    label: str
    towers: Towers
    encoder: Encoder
    table: Mapping[str, int]
    embeddings: np.ndarray

    @property
    def spec(self) -> Spec:
        return self.towers.spec

    def images(self, read: Callable[[int], Image.Image], count: int, seeds: int = 0) -> dict[str, np.ndarray]:
        """`Towers.images` with these weights.

        Raises:
          RunError: an embedding is not finite.
        """
        found = self.towers.images(self.encoder.vision, read, count, seeds)
        return {key: require_finite(value, self.label, "images") for key, value in found.items()}

    def dense(self, read: Callable[[int], np.ndarray], count: int, last: str) -> Iterator[np.ndarray]:
        """`Towers.dense` with these weights.

        Raises:
          RunError: a token is not finite.
        """
        for tokens in self.towers.dense(self.encoder.vision, read, count, last):
            yield require_finite(tokens, self.label, "patches of a window")

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the embeddings of texts that are in `Task.texts`, float32 [N, D], not normalised.

        Raises:
          RunError: an embedding is not finite.
        """
        return require_finite(self.embeddings[[self.table[t] for t in texts]], self.label, "texts")
