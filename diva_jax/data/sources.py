"""Opens the data at a path; the format follows from the names of the files there."""

import concurrent.futures
import functools
import os
import posixpath
import re
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from urllib.parse import parse_qsl

import numpy as np

from diva_jax.common import config_files
from diva_jax.common.errors import UserError, explained, listing
from diva_jax.common.log import say
from diva_jax.common.paths import is_remote
from diva_jax.data import files, records
from diva_jax.data.records import CAPTION_KINDS, MAX_CAPTION_BYTES, Record, Source
from diva_jax.data.tars import TarSource

_MIXTURE, _MODULE = "mix:", "module:"
_MAX_EPOCH_IMAGES = 2**31  # The shuffle of an epoch numbers its images with 32 bits.
_LISTERS = 16  # Threads that list folders.
# A path with options; a `?` that is part of a glob pattern has no NAME=VALUE after it.
_OPTIONS = re.compile(r"(.*?)\?(\w+=[^?&=]*(?:&\w+=[^?&=]*)*)")
_WEIGHTED = re.compile(r"(\d+(?:\.\d*)?|\.\d+)=(.+)", re.S)


class FolderSource(records.CaptionFiles):
    """Image files, local or remote, each one record, named relative to `root`; of each sample, one image is used (see
    `files.images_of`). Its caption is the `.txt` file of its sample, or else in the `.json` file."""

    def __init__(self, paths: Sequence[str], root: str = "", quiet: bool = False):
        self._paths = files.one_image_each(paths, "config.data.path", quiet)
        self._cut = len(root.rstrip("/")) + 1 if root and paths[0].startswith(root) else 0

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, i: int) -> str:
        """The file, relative to the root."""
        return self._paths[i][self._cut :]

    @functools.cached_property
    def _texts(self) -> dict[str, dict[str, str]]:
        """The samples' files with captions."""
        folders = {posixpath.dirname(p) for p in self._paths}
        with concurrent.futures.ThreadPoolExecutor(_LISTERS) as pool:
            there = [p for names in pool.map(files.names_in, folders) for p in names]
        texts = [p for p in there if p.lower().endswith(CAPTION_KINDS)]
        return files.group(zip(texts, texts, strict=True), "config.data.path")

    def captioned(self) -> list[int]:
        return [i for i, p in enumerate(self._paths) if files.split(p)[0] in self._texts]

    def image(self, i: int) -> bytes:
        return files.read_image(self._paths[i])

    def beside(self, i: int, kind: str) -> bytes | None:
        key, image = files.split(self._paths[i])
        path = files.beside(self._texts.get(key, {}), image, kind)
        return files.read_at_most(path, MAX_CAPTION_BYTES) if path else None


class TfdsSource:
    """The records of a prepared tfds dataset in array_record format, read without TensorFlow: `tfds:name/split`. `name`
    may have a config and a version (`coco/2017:1.1.0`) and `split` a slice (`train[:10%]`). After a `?`: `data_dir=...`
    for another folder than the default of tfds, `image=...` to choose among several image features, `text=...` for the
    captions (one of `records.TEXT_COLUMNS` if not given), and the options in `defaults`. A UserError, which names
    `flag`, where the dataset is not there, not in this format, has no records or no such features."""

    def __init__(self, spec: str, flag: str = "config.data.path", defaults: Mapping[str, str] | None = None):
        self.spec, _, query = spec.partition("?")
        self.options = {**(defaults or {}), **dict(parse_qsl(query))}
        known = dict.fromkeys(("data_dir", "image", "text", *(defaults or ())))
        name, _, split = self.spec.removeprefix("tfds:").rpartition("/")
        if not name or self.options.keys() - known.keys():
            form = "&".join(f"{option}=..." for option in known)
            raise UserError(f"{flag}={spec!r} must read tfds:name/split[?{form}]")
        import tensorflow_datasets as tfds  # Slow to import, and only this source needs it.

        self._where = f"{flag}={spec!r}"
        advice = "prepare it first with tfds.builder(name, file_format='array_record').download_and_prepare()"
        # tfds raises a different type for each of missing name, split, folder, format.
        with explained(f"{self._where} cannot be read", advice, Exception):
            builder = tfds.builder(name, data_dir=self.options.get("data_dir"))
            self.features = builder.info.features
            images = [key for key, feature in self.features.items() if type(feature) is tfds.features.Image]
            if not (image := self._chosen("image", "image feature", images)) and len(images) != 1:
                problem = f"{self._where} has {len(images)} image features ({listing(images)})"
                raise UserError(f"{problem}: choose one with ?image=...")
            self._image = image or images[0]
            captions = (key for key in records.TEXT_COLUMNS if key in self.features)
            self._text = self._chosen("text", "feature", self.features) or next(captions, None)
            # The encoded bytes: decoding and its errors belong to the pipeline.
            self._records = builder.as_data_source(split=split, decoders={self._image: tfds.decode.SkipDecoding()})
        if not len(self):
            raise UserError(f"{self._where} has no records")

    def _chosen(self, option: str, kind: str, there: Collection[str]) -> str | None:
        """The feature that an option names, if it is given; a UserError where that is not among those `there`."""
        wanted = self.options.get(option)
        if wanted and wanted not in there:
            problem = f"{self._where} cannot be read: it has no {kind} {wanted!r}, only {listing(list(there))}"
            raise UserError(f"{problem}: choose with ?{option}=...")
        return wanted

    @property
    def has_text(self) -> bool:
        return self._text is not None

    def __len__(self) -> int:
        return len(self._records)

    def name(self, i: int) -> str:
        """`tfds:name/split[i]`."""
        return f"{self.spec}[{i}]"

    def read(self, i: int, with_text: bool = True) -> Record:
        record = self._records[i]
        text = records.caption(record[self._text]) if with_text and self._text else None
        return Record(self.name(i), record[self._image], text)

    def labels(self) -> tuple[list[int], list[str]]:
        """(the label of each record, the names of the classes) of the feature `label`; a UserError for others."""
        classes = {name: feature.names for name, feature in self.features.items() if hasattr(feature, "names")}
        label = self._chosen("label", "class label", classes)
        return [int(record[label]) for record in self._records], list(classes[label])


class MixtureSource:
    """A source whose epoch has as many records of each part as its weight (the sum is 1) says. One part, the largest
    for its weight, has each of its records once per epoch. Records of the others are repeated, or rather: slot k of a
    part of n records is its record k modulo n, so that all of them come before one is repeated. Order, resumption and
    the split over processes are those of any source, which its epoch's shuffle mixes."""

    def __init__(self, parts: Sequence[Source], weights: Sequence[Fraction], path: str):
        self.parts = list(parts)
        length = max(Fraction(len(part)) / w for part, w in zip(parts, weights, strict=True))
        self.counts = [max(1, round(w * length)) for w in weights]
        if sum(self.counts) > _MAX_EPOCH_IMAGES:
            raise UserError(
                f"config.data.path={path!r}: an epoch would have {sum(self.counts)} images, more than "
                f"{_MAX_EPOCH_IMAGES}: give the large sources more weight, or fewer files"
            )
        self.has_text = all(part.has_text for part in parts)
        self._ends = np.cumsum(self.counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, i: int) -> tuple[int, int]:
        """(the number of the part, the record of the part) in slot i."""
        number, slot = records.locate(self._ends, i)
        return number, slot % len(self.parts[number])

    def name(self, i: int) -> str:
        """The record's name in its part."""
        number, record = self.locate(i)
        return self.parts[number].name(record)

    def read(self, i: int, with_text: bool = True) -> Record:
        number, record = self.locate(i)
        return self.parts[number].read(record, with_text)

    def texts(self, i: int) -> tuple[str, ...] | None:
        """The list `texts` of the record in slot i."""
        number, record = self.locate(i)
        part = self.parts[number]
        return part.texts(record) if hasattr(part, "texts") else part.read(record).texts


def _mixture(path: str, quiet: bool, **kw) -> MixtureSource:
    """`mix:2=a.csv;1=b/*.tar`: two thirds of the records are those of a.csv."""
    entries = [entry.strip() for entry in path.removeprefix(_MIXTURE).split(";") if entry.strip()]
    matches = [_WEIGHTED.fullmatch(entry) for entry in entries]
    if not matches or not all(matches) or not all(Fraction(m[1]) > 0 for m in matches):
        raise UserError(
            f"config.data.path={path!r} must read mix:WEIGHT=PATH;WEIGHT=PATH with weights above 0, e.g. "
            "'mix:0.7=cc3m/{00000..00331}.tar;0.3=mine.csv'"
        )
    weights, paths = [Fraction(m[1]) for m in matches], [m[2].strip() for m in matches]
    if nested := [p for p in paths if p.startswith(_MIXTURE)]:
        raise UserError(f"config.data.path={path!r}: {nested[0]!r} is a mixture in a mixture: write its parts instead")
    parts = [open_source(p, quiet=quiet, **kw) for p in paths]
    source = MixtureSource(parts, [w / sum(weights) for w in weights], path)
    for name, part, count in zip(paths, parts, source.counts, strict=True) if not quiet else ():
        share, times = count / len(source), count / len(part)
        say(f"{name}: {share:.1%} of the images: {len(part):,}, each {times:.3g} times per epoch")
    return source


def open_source(path: str, cache_dir: str | None = None, quiet: bool = False, allow_urls: bool = False) -> Source:
    """Opens a data path; local files, or those of a scheme (gs://...). A UserError where nothing that can be read is
    there.

    - A .tar shard, a brace or glob pattern of shards, or a folder with shards.
    - A folder with images at any depth, or a pattern.
    - A .csv, .tsv, .jsonl or .parquet file, a pattern, or a folder with them; a folder that Hugging Face's
      `save_to_disk` has written. `?image=COLUMN&text=COLUMN&texts=COLUMN` chooses the columns.
    - `module:DOTTED.PATH?OPTIONS`: what `open_source(OPTIONS)` of that module returns, a `Source` of your own.
    - `tfds:name/split`, see `TfdsSource`; `mix:WEIGHT=PATH;WEIGHT=PATH` of any of these, see `MixtureSource`.

    The index of tar shards is kept in `cache_dir`, if any. `quiet` reports neither progress nor what is left out.
    `allow_urls` is `config.data.allow_urls`.
    """
    path = path or ""
    if path.startswith(_MIXTURE):
        return _mixture(path, quiet, cache_dir=cache_dir, allow_urls=allow_urls)
    if path.startswith(_MODULE):
        name, _, options = path.removeprefix(_MODULE).partition("?")
        wanted = "give module:NAME of one on PYTHONPATH that defines open_source(options)"
        module = config_files.module(name, "config.data.path", wanted)
        if not hasattr(module, "open_source"):
            raise UserError(f"config.data.path={path!r}: the module {name} cannot be used: {wanted}")
        return module.open_source(options)
    if path.startswith("tfds:"):
        return TfdsSource(path)
    match = _OPTIONS.fullmatch(path)
    path, options = (match[1], dict(parse_qsl(match[2], keep_blank_values=True))) if match else (path, {})
    if unknown := [o for o in options if o not in ("image", "text", "texts") or not options[o]]:
        raise UserError(
            f"config.data.path={path!r} has the option {listing(unknown)}: after ? write image=COLUMN, text=COLUMN, "
            "texts=COLUMN, or several with & between them"
        )
    path = path if is_remote(path) else os.path.expanduser(path)
    advice = "check it, the network and this account's rights"
    # An object store refuses by an exception of its own; a local folder that is not there is a UserError.
    with explained(f"config.data.path={path!r} cannot be read", advice, Exception if is_remote(path) else OSError):
        kind, paths = files.find(path)
        if kind not in ("tars", "images"):
            from diva_jax.data.tables import open_tables  # Here, because pyarrow takes 50 ms to import.

            return open_tables(kind, paths, path, options, quiet, allow_urls)
    if options:
        problem = f"config.data.path={path!r} holds {kind}, which have no columns"
        raise UserError(f"{problem}: leave ?{'&'.join(options)} out")
    if kind == "tars":
        return TarSource(paths, cache_dir, quiet)
    return FolderSource(paths, path if files.is_folder(path) else "", quiet)
