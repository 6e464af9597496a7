"""Encoders, which are any source of weights or a run at a step, and their embeddings of images and texts: batches of a
fixed size, the last one padded, on any mesh."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from PIL import Image

from diva_jax.common import log
from diva_jax.common.errors import RunError, UserError
from diva_jax.data import files, images
from diva_jax.data.preprocess import normalise, to_float
from diva_jax.evals import Settings
from diva_jax.models import backbones
from diva_jax.models.backbones import Features, Spec
from diva_jax.models.layers import Array
from diva_jax.training import checkpoint, partition, workdirs
from diva_jax.weights import names, origins, parts

_WHICH = r"all|random [1-9]\d{0,4}"
_READOUT = re.compile(
    r"(?P<cls>pooled|cls|l2\(cls\))"
    rf"( \+ mean\(((?P<plain>{_WHICH})|l2\((?P<normed>{_WHICH})\))\))?"
    r"(?P<after>, l2)?"
)


class Readout(NamedTuple):
    """The computation of one image embedding from tokens. `l2_cls` normalises the pooled token first, `l2_patches` each
    patch token, `l2_after` the sum. `patches` is how many patch tokens are drawn (uniformly, with replacement) and
    averaged; 0: all; None: none."""

    l2_cls: bool
    patches: int | None
    l2_patches: bool
    l2_after: bool


def parse_readout(text: str) -> Readout:
    """Parses a readout such as `"l2(cls) + mean(l2(random 364))"`; "pooled" is "cls, l2". A UserError for others."""
    match = _READOUT.fullmatch(text)
    if not match:
        form = "cls or l2(cls), then optionally + mean(TOKENS) with all, random K, l2(all) or l2(random K) as tokens"
        raise UserError(f"backbone.readout={text!r} cannot be read: write {form}, then optionally ', l2'")
    which = match["plain"] or match["normed"]
    count = None if which is None else int(which.removeprefix("random ").replace("all", "0"))
    after = bool(match["after"]) or match["cls"] == "pooled"
    return Readout(match["cls"] == "l2(cls)", count, bool(match["normed"]), after)


def l2(x: Array) -> Array:
    """Scales [..., D] to length one."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def read_out(readout: Readout, features: Features, weights: Array | None) -> Array:
    """K embeddings per image, float32 [B, K, D], from tokens [B, P, D] and pooled [B, D]. `weights` are those of each
    patch in the mean, [B, K, P]; without patches they are None, and K is 1."""
    tokens, cls = (x.astype(jnp.float32) for x in features)
    out = (l2(cls) if readout.l2_cls else cls)[:, None]  # [B, 1, D]
    if readout.patches is not None:
        out = out + jnp.einsum("bkp,bpd->bkd", weights, l2(tokens) if readout.l2_patches else tokens)
    return l2(out) if readout.l2_after else out


def patch_weights(readout: Readout, patches: int, row: int, seeds: int, seed: int) -> np.ndarray:
    """The weights of P patches in the mean, float32 [K, P], for the image of this number, on which, with the seed, the
    draws alone depend. K is `seeds` where patches are drawn, else 1."""
    if not readout.patches:
        return np.full((1, patches), 1 / patches, np.float32)
    drawn = [np.random.default_rng((seed, k, row)).integers(0, patches, readout.patches) for k in range(seeds)]
    counts = np.stack([np.bincount(indices, minlength=patches) for indices in drawn])
    return (counts / readout.patches).astype(np.float32)


def unit(x: np.ndarray) -> np.ndarray:
    """Scales [..., D] to length one, in float64."""
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def require_finite(values: np.ndarray, label: str, what: str, kind: str = "embeddings") -> np.ndarray:
    """Returns values [N, ...] of `what` ("images"); a RunError, with the weights' label, where not finite."""
    bad = int((~np.isfinite(values).reshape(len(values), -1).all(axis=1)).sum())
    if bad:
        problem = f"the {kind} of {bad} of {len(values)} {what} are not finite"
        raise RunError(f"{label}: {problem}: these weights cannot be evaluated")
    return values


def spread(rows: Sequence[np.ndarray], mesh: Mesh) -> Array:
    """A row for each item of a batch as one global array over all devices; those of other processes are not used."""
    shape, sharding = (len(rows), *np.shape(rows[0])), NamedSharding(mesh, partition.BATCH)
    return jax.make_array_from_callback(shape, sharding, lambda index: np.stack(rows[index[0]]))


class Towers:
    """A backbone's two towers, compiled once; weights are given with each call, batches are split over the mesh."""

    def __init__(self, spec: Spec, mesh: Mesh, settings: Settings):
        self.spec, self.mesh, self.settings = spec, mesh, settings
        self.readout = parse_readout(spec.readout)
        self._vision = partition.disassemble(names.abstract("vision", spec, dtype=jnp.dtype(settings.dtype)))[0]
        self.batch = -(-settings.batch_size // mesh.size) * mesh.size
        self._pixels = jax.ShapeDtypeStruct((spec.image_size, spec.image_size, 3), np.uint8)
        self._encode_images = self._compiled(self._image_step, static_argnames="readout")
        self._encode_texts = self._compiled(lambda arrays, ids: self._text.merge(arrays).encode(ids))
        self._encode_dense = self._compiled(self._dense_step, static_argnames="last")

    @functools.cached_property
    def _text(self) -> partition.Skeleton:
        """The text tower without its arrays; a UserError if the backbone has none."""
        return partition.disassemble(names.abstract("text", self.spec, dtype=jnp.dtype(self.settings.dtype)))[0]

    def _compiled(self, step: Callable, **static: str) -> Callable:
        # By default TPUs multiply float32 matrices in bfloat16; an evaluation in float32 must not.
        step = jax.default_matmul_precision("highest" if self.settings.dtype == "float32" else "default")(step)
        return jax.jit(step, out_shardings=NamedSharding(self.mesh, P()), **static)

    def _normalised(self, pixels: Array) -> Array:
        return normalise(to_float(pixels), self.spec.mean, self.spec.std)

    def _image_step(self, arrays, pixels: Array, weights: Array | None = None, *, readout: Readout | None):
        """uint8 [B, S, S, 3] -> pooled [B, D] and, with a readout, its embeddings [B, K, D]."""
        features = self._vision.merge(arrays).encode(self._normalised(pixels))
        out = {"pooled": features.pooled.astype(jnp.float32)}
        return out if readout is None else out | {"published": read_out(readout, features, weights)}

    def _dense_step(self, arrays, pixels: Array, *, last: str) -> Array:
        """uint8 [B, S, S, 3] -> patch tokens [B, P, D]."""
        return self._vision.merge(arrays).encode_dense(self._normalised(pixels), last).astype(jnp.float32)

    def outputs(self, step: Callable, read: Callable[[int], tuple], count: int, *like: Array) -> Iterator[Any]:
        """Yields the outputs of a compiled step for items 0..count-1, batch by batch, without the padding. `read` gives
        the arrays of one item, of the shapes `like`; it is called from threads, while the previous batch is in use."""
        mine = partition.rows_here(self.mesh, self.batch)
        padding = [np.zeros(x.shape, x.dtype) for x in like]
        read = images.kept()(read)
        with ThreadPoolExecutor(files.THREADS) as pool:

            def begin(first: int) -> dict[int, Future]:
                return {i: pool.submit(read, first + i) for i in mine if first + i < count}

            ahead = begin(0)
            try:
                for first in range(0, count, self.batch):
                    now, ahead = ahead, begin(first + self.batch)
                    rows = [now[i].result() if i in now else padding for i in range(self.batch)]
                    out = step(*(spread(column, self.mesh) for column in zip(*rows, strict=True)))
                    yield jax.tree.map(lambda x, first=first: np.asarray(x)[: count - first], out)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def images(
        self, arrays: Mapping[str, Array], read: Callable[[int], Image.Image | np.ndarray], count: int, seeds: int = 0
    ) -> dict[str, np.ndarray]:
        """The embeddings of images 0..count-1, which `read` returns in threads, as arrays where they are prepared:
        {"pooled": float32 [count, D]} and, with seeds, "published": [count, K, D], the spec's readout. K is `seeds`
        where it draws patches, else 1."""
        spec, readout = self.spec, self.readout if seeds else None
        like = [self._pixels]
        if readout and readout.patches is not None:
            like.append(jax.ShapeDtypeStruct((seeds if readout.patches else 1, spec.patches), np.float32))

        def load(i: int) -> tuple[np.ndarray, ...]:
            pixels = read(i)
            if isinstance(pixels, Image.Image):
                pixels = images.prepare(pixels, spec.image_size, spec.resize_mode, spec.interpolation)
            if len(like) == 1:
                return (pixels,)
            return pixels, patch_weights(readout, spec.patches, i, seeds, self.settings.seed)

        out, step = [], functools.partial(self._encode_images, arrays, readout=readout)
        with log.progress("encoding", count, "images", every=30) as progress:
            for embeddings in self.outputs(step, load, count, *like):
                out.append(embeddings)
                progress.update(len(embeddings["pooled"]))
        return {k: np.concatenate([o[k] for o in out]) for k in out[0]}

    def dense(
        self, arrays: Mapping[str, Array], read: Callable[[int], np.ndarray], count: int, last: str
    ) -> Iterator[np.ndarray]:
        """Patch tokens of windows 0..count-1, in order, each float32 [P, D], not normalised. `read` gives window i,
        uint8 [S, S, 3], in threads; `last` is one of `models.backbones.shared.transformer.VARIANTS`."""
        step = functools.partial(self._encode_dense, arrays, last=last)
        for tokens in self.outputs(step, lambda i: (read(i),), count, self._pixels):
            yield from tokens

    def texts(self, arrays: Mapping[str, Array], ids: np.ndarray) -> np.ndarray:
        """Computes the embeddings of token ids int32 [N, context_length]: float32 [N, D], not normalised."""
        like = jax.ShapeDtypeStruct(ids.shape[1:], ids.dtype)
        step = functools.partial(self._encode_texts, arrays)
        return np.concatenate(list(self.outputs(step, lambda i: (ids[i],), len(ids), like))).astype(np.float32)


class Encoder(NamedTuple):
    """One set of weights: parameters, name -> array on the mesh, of the vision tower and, if a run has trained it, of
    the text tower, else None.

    `source` is that of the text tower and the tokenizer, `base` that of the vision tower that a run began with, or of
    these weights themselves. `params` are the objective's parameters that a run has trained, and `borrowed` is the
    label of that run where it is another one; `run` is the run itself, without its arrays."""

    vision: Mapping[str, jax.Array]
    text: Mapping[str, jax.Array] | None
    source: str
    params: Mapping[str, jax.Array]
    base: str
    borrowed: str = ""
    run: workdirs.RunAt | None = None


def tower(kind: str, source: str, spec: Spec, mesh: Mesh, min_shard: int) -> dict[str, jax.Array]:
    """The parameters of one tower, "vision" or "text", of a source: name -> array on the mesh; smaller arrays than
    `min_shard` are replicated. A UserError where it is missing, invalid, or of another architecture."""
    opened = parts.open_tower(kind, origins.open_source(source, "--weights"), spec)
    module = names.flat(names.abstract(kind, spec))
    shardings = partition.parameter_shardings(module, mesh, min_shard)
    placed = {path: var.replace(var.get_value().update(sharding=shardings[path])) for path, var in module.items()}
    state = opened.fill(nnx.from_flat_state(placed))
    return {partition.name_of(path): var.get_value() for path, var in names.flat(state).items()}


def put(arrays: Mapping[str, jax.Array], mesh: Mesh, min_shard: int) -> dict[str, jax.Array]:
    """Places the parameters of a tower on the mesh; arrays with fewer than `min_shard` elements are replicated."""
    shardings = partition.parameter_shardings(arrays, mesh, min_shard)
    return {n: jax.device_put(a, shardings[n]) for n, a in arrays.items()}


def check(source: str, step: int | None, config, texts: bool) -> list[str]:
    """A UserError where weights are missing, of another architecture than the config's backbone or, where `texts` are
    needed, those of a run are gone or changed from which it has its text tower, before any arrays are read; the result
    of `origins.other_preparation` else. Source and step are those of a `Place`."""
    wanted = backbones.spec_of(config)
    if step is None:
        opened = origins.open_source(source, "--weights")
        parts.open_tower("vision", opened, wanted)
        return origins.other_preparation(opened.spec, wanted, opened.where)
    sources, where = checkpoint.stored(source, "sources", step) if texts else None, f"the run {source}"
    run = workdirs.RunAt(source, step, workdirs.read_config(source), {}, sources or {}, {})
    spec = backbones.spec_of(run.config)
    origins.check_same(vars(spec), wanted, (*origins.ARCHITECTURE, "image_size"), where, "config.backbone")
    if "text" in run.program.towers.shapes:
        fields = vars(spec.text).keys() - {"kept_positions"}
        origins.check_same(vars(spec.text), wanted.text, fields, where, "config.backbone.text")
    elif texts:
        run.open_base()
    return origins.other_preparation(spec, wanted, where)


def read(source: str, step: int | None, config, mesh: Mesh) -> Encoder:
    """Loads weights that `check` accepts onto the mesh. The config has the text tower if the source has none."""
    if step is not None:  # Parameters that the run does not train are those of its initial source.
        run = workdirs.RunAt.open(source, step)
        spec, min_shard = backbones.spec_of(run.config), run.config.mesh.min_shard
        towers = {kind: put(arrays, mesh, min_shard) for kind, arrays in run.towers().items() if kind in names.TOWERS}
        own, params, run = towers.get("text"), put(run.params, mesh, min_shard), dataclasses.replace(run, params={})
        return Encoder(towers["vision"], own, spec.source, params, spec.source, run=run)
    vision = tower("vision", source, backbones.spec_of(config), mesh, config.mesh.min_shard)
    text = source if origins.open_source(source, "--weights").has_text else config.backbone.source
    return Encoder(vision, None, text, {}, source)


def lend(members: Mapping[str, origins.Place], mesh: Mesh) -> tuple[dict[str, jax.Array], str]:
    """The parameters outside the towers (`visual_proj/...`) that the first run among several sources has trained, and
    its label, for `Encoder.params` of those that are no runs: the scores before and after tuning must use the same
    parameters. ({}, "") where there are only runs, or none."""
    lender, place = next(((label, p) for label, p in members.items() if p.step is not None), ("", None))
    if place is None or all(p.step is not None for p in members.values()):
        return {}, ""
    run = workdirs.RunAt.open(place.source, place.step)
    own = set().union(*(run.program.towers.needs(t) for t in run.program.towers.shapes))
    lent = put({n: a for n, a in run.params.items() if n not in own}, mesh, run.config.mesh.min_shard)
    return lent, lender if lent else ""


class Model(NamedTuple):
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
        """Embeddings of some of `Task.texts`, float32 [N, D], not normalised; a RunError where not finite."""
        return require_finite(self.embeddings[[self.table[t] for t in texts]], self.label, "texts")
