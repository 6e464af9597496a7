"""What a data set is made of, records with an image and, where the data has captions, a text; and the sources of
records, of which the one at a path follows from the names of the files there."""

import concurrent.futures
import contextlib
import functools
import os
import posixpath
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple, Protocol
from urllib.parse import parse_qsl

import numpy as np

from diva_jax.common import config_files, json_files
from diva_jax.common.errors import UserError, explained, listing
from diva_jax.common.log import say
from diva_jax.common.paths import is_remote
from diva_jax.data import files

# Columns and features with captions, where the data's path has no `text=NAME`; the first that there is.
TEXT_COLUMNS = ("caption", "text", "title", "captions")
# Files with captions beside an image, or in its tar: the first that is not blank.
CAPTION_KINDS = ("txt", "json")
# Number of records that are searched for captions.
_PROBED = 64
# A larger text file beside an image, or in its tar, is not taken for a caption.
MAX_CAPTION_BYTES = 2**20
# Largest number of entries in a record's list `texts`, and of characters in each.
_MAX_TEXTS, _MAX_TEXT = 64, 4096
_MIXTURE, _MODULE = "mix:", "module:"
# The shuffle of an epoch numbers its images with 32 bits.
_MAX_EPOCH_IMAGES = 2**31
# A path with options; a `?` that is part of a glob pattern has no NAME=VALUE after it.
_OPTIONS = re.compile(r"(.*?)\?(\w+=[^?&=]*(?:&\w+=[^?&=]*)*)")
_WEIGHTED = re.compile(r"(\d+(?:\.\d*)?|\.\d+)=(.+)", re.S)


class Record(NamedTuple):
    """One record: what to call it in a log (file and member or row), the encoded image, and its caption, None where
    there is none; several are separated by newlines, see `captions`. `texts` are statements that differ in one fact,
    see `alternatives`; None where there are none, or the source has a method `texts(i)` that reads them."""

    name: str
    image: bytes
    text: str | None = None
    texts: tuple[str, ...] | None = None


class Source(Protocol):
    """Records 0..len-1 with random access. `name` and `read` may be called from any thread. `has_text` is whether the
    records have captions, as far as can be known without reading each of them."""

    has_text: bool

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """The name of record i."""

    def read(self, i: int, with_text: bool = True) -> Record:
        """Record i, without its text where that is not asked for; errors are the source's own."""


def caption(value) -> str | None:
    """The `Record.text` of what files hold: one text, or bytes in UTF-8, in which ends of lines are white space; a list
    of texts, which are several captions; or None. A ValueError for anything else."""
    if isinstance(value, bytes):
        value = value.decode("utf-8-sig")
    if value is None or isinstance(value, str):
        return " ".join(lines) if len(lines := captions(value)) > 1 else value
    if isinstance(value, Iterable) and not isinstance(value, Mapping):
        return "\n".join(filter(None, map(caption, value)))
    raise ValueError(f"its caption is no text but {value!r}")


def captions(text: str | None) -> list[str]:
    """The captions in a `Record.text` that are not blank."""
    return [one for one in (text or "").split("\n") if one.strip()]


def listed(value) -> tuple[str, ...] | None:
    """The `texts` of a record, 2 to 64 different ones, of a list or its JSON, or None; a ValueError for others."""
    if isinstance(value, str | bytes):
        value = json_files.decoded(value) if value.strip() else None
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise ValueError("its texts are no list of texts")
    found = tuple(text.strip() for text in value)
    if not 2 <= len(found) <= _MAX_TEXTS or not all(found) or len(set(found)) < len(found):
        raise ValueError(f"its texts are not 2 to {_MAX_TEXTS} different ones, none of them blank")
    if max(map(len, found)) > _MAX_TEXT:
        raise ValueError(f"one of its texts has more than {_MAX_TEXT} characters")
    return found


def locate(ends: np.ndarray, i: int) -> tuple[int, int]:
    """(the part with item i, the item's number in it) of parts in a row, of which the k-th ends before `ends[k]`."""
    part = int(np.searchsorted(ends, i, side="right"))
    return part, i - (int(ends[part - 1]) if part else 0)


class CaptionFiles:
    """What sources have in common whose captions are files beside the images. They have `image(i)`, the encoded image
    of record i, `beside(i, kind)`, the content of its file of one of `CAPTION_KINDS` or None, and `captioned()`, the
    records with such files."""

    def read(self, i: int, with_text: bool = True) -> Record:
        """See `Source.read`; an OSError where a file cannot be read, a ValueError for a broken caption."""
        return Record(self.name(i), self.image(i), self._text(i) if with_text else None)

    def texts(self, i: int) -> tuple[str, ...] | None:
        """The list `texts` in the JSON file of record i; errors as of `read`."""
        data = self.beside(i, "json")
        meta = json_files.decoded(data) if data else None
        return listed(meta.get("texts")) if isinstance(meta, dict) else None

    def _text(self, i: int) -> str | None:
        """The first caption that is not blank: a text, or a JSON object's field "caption"."""
        for kind in CAPTION_KINDS:
            data = self.beside(i, kind)
            try:
                if kind == "json" and data:
                    meta = json_files.decoded(data)
                    data = meta.get("caption") if isinstance(meta, dict) else None
                text = caption(data)
            except ValueError as e:
                raise ValueError(f"the caption in its .{kind} file cannot be read ({e})") from e
            if text and text.strip():
                return text
        return None

    @functools.cached_property
    def has_text(self) -> bool:
        """Whether one of 64 records with files for captions, spread over all, has a caption that can be read."""
        records = self.captioned()
        for i in records[:: -(-len(records) // _PROBED) or 1]:
            with contextlib.suppress(OSError, ValueError):
                if self._text(i):
                    return True
        return False


class FolderSource(CaptionFiles):
    """Image files, local or remote, each one record, named relative to `root`; of each sample, one image is used (see
    `files.images_of`). Its caption is the `.txt` file of its sample, or else in the `.json` file."""

    def __init__(self, paths: Sequence[str], root: str = ""):
        self._paths = files.one_image_each(paths, "config.data.path")
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
        with concurrent.futures.ThreadPoolExecutor(files.THREADS) as pool:
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
    captions (one of `TEXT_COLUMNS` if not given), `texts=...` for lists of texts ("texts" if not given), and the
    options in `defaults`. A UserError, which names `flag`, where the dataset is not there, not in this format, has no
    records or no such features."""

    def __init__(self, spec: str, flag: str = "config.data.path", defaults: Mapping[str, str] | None = None):
        self.spec, _, query = spec.partition("?")
        self.options = {**(defaults or {}), **dict(parse_qsl(query))}
        known = dict.fromkeys(("data_dir", "image", "text", "texts", *(defaults or ())))
        name, _, split = self.spec.removeprefix("tfds:").rpartition("/")
        if not name or self.options.keys() - known.keys():
            form = "&".join(f"{option}=..." for option in known)
            raise UserError(f"{flag}={spec!r} must read tfds:name/split[?{form}]")
        import tensorflow_datasets as tfds  # Slow to import, and only this source needs it.

        self._where = f"{flag}={spec!r}"
        prepare = "prepare it first with tfds.builder(name, file_format='array_record').download_and_prepare()"
        # tfds raises a different type for each of missing name, split, folder, format.
        with explained(f"{self._where} cannot be read", f"{prepare}, or name its folder, ?data_dir=...", Exception):
            builder = tfds.builder(name, data_dir=self.options.get("data_dir"))
            self.features = builder.info.features
            images = [key for key, feature in self.features.items() if type(feature) is tfds.features.Image]
            if not (image := self._chosen("image", "image feature", images)) and len(images) != 1:
                problem = f"{self._where} has {len(images)} image features ({listing(images)})"
                raise UserError(f"{problem}: choose one with ?image=...")
            self._image = image or images[0]
            captions = (key for key in TEXT_COLUMNS if key in self.features)
            self._text = self._chosen("text", "feature", self.features) or next(captions, None)
            self.has_text = self._text is not None
            texts = "texts" if "texts" in self.features else None
            self._texts = self._chosen("texts", "feature", self.features) or texts
        advice = f"name a split, or slice of one, that has records; if the format is another one, {prepare}"
        with explained(f"{self._where}: the split cannot be read", advice, Exception):
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

    def __len__(self) -> int:
        return len(self._records)

    def name(self, i: int) -> str:
        """`tfds:name/split[i]`."""
        return f"{self.spec}[{i}]"

    def read(self, i: int, with_text: bool = True) -> Record:
        record = self._records[i]
        text = caption(record[self._text]) if with_text and self._text else None
        return Record(self.name(i), record[self._image], text)

    def texts(self, i: int) -> tuple[str, ...] | None:
        """The list of texts of record i, of which an empty one is none; a ValueError where it is no such list."""
        found = self._records[i][self._texts] if self._texts else ()
        return listed([caption(text) for text in found] or None)

    def labels(self) -> tuple[list[int], list[str]]:
        """(the label of each record, the names of the classes) of the feature `label`; a UserError for others."""
        classes = {name: feature.names for name, feature in self.features.items() if hasattr(feature, "names")}
        label = self._chosen("label", "class label", classes)
        return [int(record[label]) for record in self._records], list(classes[label])


class MixtureSource:
    """A source whose epoch has as many records of each part as its weight (the sum is 1) says. One part, the largest
    for its weight, has each of its records once per epoch. Slot k of a part with n records is its record k modulo n, so
    that records of the other parts are repeated evenly. Order, resumption and the split over processes are those of any
    source; the shuffle of the epoch mixes the parts."""

    def __init__(self, parts: Sequence[Source], weights: Sequence[Fraction], path: str):
        self.parts = list(parts)
        length = max(Fraction(len(part)) / w for part, w in zip(parts, weights, strict=True))
        self.counts = [max(1, round(w * length)) for w in weights]
        if (images := sum(self.counts)) > _MAX_EPOCH_IMAGES:
            problem = f"config.data.path={path!r}: an epoch would have {images} images, more than {_MAX_EPOCH_IMAGES}"
            raise UserError(f"{problem}: give the large sources more weight, or fewer files")
        self.has_text = all(part.has_text for part in parts)
        self._ends = np.cumsum(self.counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, i: int) -> tuple[int, int]:
        """(the number of the part, the record of the part) in slot i."""
        number, slot = locate(self._ends, i)
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


def _mixture(path: str, **kw) -> MixtureSource:
    """`mix:2=a.csv;1=b/*.tar`: two thirds of the records are those of a.csv."""
    entries = [entry.strip() for entry in path.removeprefix(_MIXTURE).split(";") if entry.strip()]
    matches = [_WEIGHTED.fullmatch(entry) for entry in entries]
    if not matches or not all(matches) or not all(Fraction(m[1]) > 0 for m in matches):
        form = "mix:WEIGHT=PATH;WEIGHT=PATH with weights above 0, e.g. 'mix:0.7=cc3m/{00000..00331}.tar;0.3=mine.csv'"
        raise UserError(f"config.data.path={path!r} must read {form}")
    weights, paths = [Fraction(m[1]) for m in matches], [m[2].strip() for m in matches]
    if nested := [p for p in paths if p.startswith(_MIXTURE)]:
        raise UserError(f"config.data.path={path!r}: {nested[0]!r} is a mixture in a mixture: write its parts instead")
    parts = [open_source(p, **kw) for p in paths]
    source = MixtureSource(parts, [w / sum(weights) for w in weights], path)
    for name, part, count in zip(paths, parts, source.counts, strict=True):
        share, times = count / len(source), count / len(part)
        say(f"{name}: {share:.1%} of the images: {len(part):,}, each {times:.3g} times per epoch")
    return source


def open_source(path: str, cache_dir: str | None = None, allow_urls: bool = False) -> Source:
    """Opens a data path; local files, or those of a scheme (gs://...). A UserError where nothing that can be read is
    there.

    - A .tar shard, a brace or glob pattern of shards, or a folder with shards.
    - A folder with images at any depth, or a pattern.
    - A .csv, .tsv, .jsonl or .parquet file, a pattern, or a folder with them; a folder that Hugging Face's
      `save_to_disk` has written. `?image=COLUMN&text=COLUMN&texts=COLUMN` chooses the columns.
    - `module:DOTTED.PATH?OPTIONS`: what `open_source(OPTIONS)` of that module returns, a `Source` of your own.
    - `tfds:name/split`, see `TfdsSource`; `mix:WEIGHT=PATH;WEIGHT=PATH` of any of these, see `MixtureSource`.

    The index of tar shards is kept in `cache_dir`, if any. `allow_urls` is `config.data.allow_urls`.
    """
    path = path or ""
    if path.startswith(_MIXTURE):
        return _mixture(path, cache_dir=cache_dir, allow_urls=allow_urls)
    if path.startswith(_MODULE):
        name, _, options = path.removeprefix(_MODULE).partition("?")
        wanted = "give module:NAME of one on PYTHONPATH that defines open_source(options), which returns a Source"
        module = config_files.module(name, "config.data.path", wanted)
        found = module.open_source(options) if hasattr(module, "open_source") else None
        if missing := [part for part in ("has_text", "__len__", "name", "read") if not hasattr(found, part)]:
            problem = f"config.data.path={path!r}: the module {name} opens nothing with {listing(missing)}"
            raise UserError(f"{problem}: {wanted}")
        return found
    if path.startswith("tfds:"):
        return TfdsSource(path)
    match = _OPTIONS.fullmatch(path)
    path, options = (match[1], dict(parse_qsl(match[2], keep_blank_values=True))) if match else (path, {})
    if unknown := [o for o in options if o not in ("image", "text", "texts") or not options[o]]:
        problem = f"config.data.path={path!r} has the option {listing(unknown)}"
        advice = "after ? write image=COLUMN, text=COLUMN, texts=COLUMN, or several with & between them"
        raise UserError(f"{problem}: {advice}")
    path = path if is_remote(path) else os.path.expanduser(path)
    advice = "check it, the network and this account's rights"
    # An object store refuses by an exception of its own; a local folder that is not there is a UserError.
    with explained(f"config.data.path={path!r} cannot be read", advice, Exception if is_remote(path) else OSError):
        kind, paths = files.find(path)
        if kind not in ("tars", "images"):
            from diva_jax.data.tables import open_tables  # Here, because pyarrow takes 50 ms to import.

            return open_tables(kind, paths, path, options, allow_urls)
    if options:
        problem = f"config.data.path={path!r} holds {kind}, which have no columns"
        raise UserError(f"{problem}: leave ?{'&'.join(options)} out")
    if kind == "tars":
        from diva_jax.data.tars import TarSource  # Here, because it needs this module.

        return TarSource(paths, cache_dir)
    return FolderSource(paths, path if files.is_folder(path) else "")
