"""Opens the data at a path; the format follows from the names of the files there."""

import concurrent.futures
import functools
import os
import posixpath
import re
from collections.abc import Sequence
from urllib.parse import parse_qsl

from diva_jax.common import imports
from diva_jax.common.errors import UserError, listing
from diva_jax.common.log import say
from diva_jax.common.paths import is_remote, reason
from diva_jax.data import files, mixture, samples
from diva_jax.data.records import (
    CAPTION_KINDS,
    MAX_CAPTION_BYTES,
    Record,
    Source,
    first_caption,
    has_captions,
    listed_in,
)
from diva_jax.data.tars import TarSource
from diva_jax.data.tfds_source import TfdsSource

_MODULE = "module:"
# Threads that list folders.
_LISTERS = 16
# A path with options; a `?` that is part of a glob pattern has no NAME=VALUE after it.
_OPTIONS = re.compile(r"(.*?)\?(\w+=[^?&=]*(?:&\w+=[^?&=]*)*)")


class FolderSource:
    """Image files, local or remote, each one record, named relative to `root`; of each sample, one image is used (see
    `samples.images_of`). Its caption is the `.txt` file of its sample, or else in the `.json` file."""

    def __init__(self, paths: Sequence[str], root: str = "", quiet: bool = False):
        self._paths = samples.one_image_each(paths, "config.data.path", quiet)
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
        return samples.group(zip(texts, texts, strict=True), "config.data.path")

    @functools.cached_property
    def has_text(self) -> bool:
        """Whether one of 64 images with files for captions, spread over all, has a caption."""
        return has_captions(self._text, [i for i, p in enumerate(self._paths) if samples.split(p)[0] in self._texts])

    def read(self, i: int, with_text: bool = True) -> Record:
        """See `Source.read`; an OSError where a file cannot be read, a ValueError for a broken caption."""
        return Record(self.name(i), files.read_image(self._paths[i]), self._text(i) if with_text else None)

    def texts(self, i: int) -> tuple[str, ...] | None:
        """The list `texts` in the `.json` file of record i; errors as of `read`."""
        path = self._beside(i, "json")
        return listed_in(files.read_at_most(path, MAX_CAPTION_BYTES)) if path else None

    def _beside(self, i: int, kind: str) -> str | None:
        key, image = samples.split(self._paths[i])
        return samples.beside(self._texts.get(key, {}), image, kind)

    def _text(self, i: int) -> str | None:
        found = ((kind, self._beside(i, kind)) for kind in CAPTION_KINDS)
        return first_caption((kind, files.read_at_most(p, MAX_CAPTION_BYTES)) for kind, p in found if p)


def split_options(path: str) -> tuple[str, dict[str, str]]:
    """`"a.csv?image=file&text=title"` -> ("a.csv", {"image": "file", "text": "title"}); a UserError for others."""
    match = _OPTIONS.fullmatch(path)
    if not match:
        return path, {}
    options = dict(parse_qsl(match[2], keep_blank_values=True))
    if unknown := [o for o in options if o not in ("image", "text", "texts") or not options[o]]:
        raise UserError(
            f"config.data.path={path!r} has the option {listing(unknown)}: after ? write image=COLUMN, text=COLUMN, "
            "texts=COLUMN, or several with & between them"
        )
    return match[1], options


def _mixture(path: str, cache_dir: str | None, quiet: bool, allow_urls: bool) -> Source:
    weights, paths = zip(*mixture.split(path), strict=True)
    if nested := [p for p in paths if p.startswith(mixture.PREFIX)]:
        raise UserError(f"config.data.path={path!r}: {nested[0]!r} is a mixture in a mixture: write its parts instead")
    source = mixture.MixtureSource([open_source(p, cache_dir, quiet, allow_urls) for p in paths], weights, path)
    if not quiet:
        for part, line in zip(paths, source.describe(), strict=True):
            say(f"{part}: {line}")
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
    if path.startswith(mixture.PREFIX):
        return _mixture(path, cache_dir, quiet, allow_urls)
    if path.startswith(_MODULE):
        name, _, options = path.removeprefix(_MODULE).partition("?")
        wanted = "give module:NAME of one on PYTHONPATH that defines open_source(options)"
        module = imports.module(name, "config.data.path", wanted)
        if not hasattr(module, "open_source"):
            raise UserError(f"config.data.path={path!r}: the module {name} cannot be used: {wanted}")
        return module.open_source(options)
    if path.startswith("tfds:"):
        return TfdsSource(path)
    path, options = split_options(path)
    path = path if is_remote(path) else os.path.expanduser(path)
    try:
        kind, paths = files.find(path)
        if kind not in ("tars", "images"):
            from diva_jax.data.tables import open_tables  # Here, because pyarrow takes 50 ms to import.

            return open_tables(kind, paths, path, options, quiet, allow_urls)
    except UserError:
        raise
    except Exception as e:
        # An object store that refuses, by an exception of its own; a local folder that is not there is a UserError.
        if not isinstance(e, OSError) and not is_remote(path):
            raise
        raise UserError(
            f"config.data.path={path!r} cannot be read ({reason(e)}): check it, the network and this account's rights"
        ) from e
    if options:
        raise UserError(
            f"config.data.path={path!r} holds {kind}, which have no columns: leave ?{'&'.join(options)} out"
        )
    if kind == "tars":
        return TarSource(paths, cache_dir, quiet)
    return FolderSource(paths, path if files.is_folder(path) else "", quiet)
