"""Random-access sources of encoded images, told apart by looking at the path."""

import os
from collections.abc import Sequence
from urllib.parse import parse_qsl

from diva_jax.common.errors import UserError, listing
from diva_jax.data import files
from diva_jax.data.records import Record, Source
from diva_jax.data.tars import TarSource


class FolderSource:
    """Image files, each one record.

    Args:
      paths: the files, local or remote.
      root: what names are relative to.
    """

    def __init__(self, paths: Sequence[str], root: str = ""):
        self.paths = list(paths)
        self._cut = len(root.rstrip("/")) + 1 if root and paths[0].startswith(root) else 0

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        return self.paths[i][self._cut :]

    has_text = False

    def read(self, i: int, with_text: bool = True) -> Record:
        with files.open_binary(self.paths[i]) as f:
            return Record(self.name(i), f.read())


class TfdsSource:
    """The images of a prepared tfds dataset in array_record format, read without TensorFlow.

    Args:
      spec: `tfds:name/split`, where `name` may carry a config and a version (`coco/2017:1.1.0`) and
        `split` a slice (`train[:10%]`). Behind a `?`: `data_dir=...` for another folder than tfds's own,
        `image=...` to choose among several image features.

    Raises:
      UserError: the dataset is not there, not in this format, or has no image feature.
    """

    def __init__(self, spec: str):
        self.spec, _, query = spec.partition("?")
        options = dict(parse_qsl(query))
        name, _, split = self.spec.removeprefix("tfds:").rpartition("/")
        if not name or set(options) - {"data_dir", "image"}:
            raise UserError(f"config.data.path={spec!r} must read tfds:name/split[?data_dir=...&image=...]")
        import tensorflow_datasets as tfds  # Slow to import, and only this source needs it.

        try:
            builder = tfds.builder(name, data_dir=options.get("data_dir"))
            self._image = self._image_feature(builder.info.features, options.get("image"), tfds)
            # The encoded bytes: decoding and its errors belong to the pipeline.
            decoders = {self._image: tfds.decode.SkipDecoding()}
            self._records = builder.as_data_source(split=split, decoders=decoders)
        except UserError:
            raise
        except Exception as e:  # tfds raises a different kind for each of missing name, split, folder, format.
            why = str(e).strip().splitlines()
            raise UserError(
                f"config.data.path={spec!r} cannot be read ({why[0] if why else type(e).__name__}): prepare it "
                "first with tfds.builder(name, file_format='array_record').download_and_prepare()"
            ) from e
        if not len(self):
            raise UserError(f"config.data.path={spec!r} has no records")

    def _image_feature(self, features, wanted: str | None, tfds) -> str:
        images = [key for key, feature in features.items() if type(feature) is tfds.features.Image]
        if wanted and wanted not in images:
            raise UserError(f"config.data.path: {self.spec} has no image feature {wanted!r}, only {listing(images)}")
        if not wanted and len(images) != 1:
            raise UserError(
                f"config.data.path: {self.spec} has {len(images)} image features ({listing(images)}): choose one "
                "with ?image=..."
            )
        return wanted or images[0]

    def __len__(self) -> int:
        return len(self._records)

    def name(self, i: int) -> str:
        return f"{self.spec}[{i}]"

    has_text = False

    def read(self, i: int, with_text: bool = True) -> Record:
        return Record(self.name(i), self._records[i][self._image])


def open_source(path: str, cache_dir: str | None = None, quiet: bool = False) -> Source:
    """Opens a data path.

    Args:
      path: a .tar shard, a brace or glob pattern of shards, a folder of shards or (recursively) of
        images, each local or behind a scheme (gs://...); or `tfds:name/split`.
      cache_dir: where the index of tar shards is kept; None keeps none.
      quiet: report neither progress nor damaged shards, for all processes of a run but the first.

    Raises:
      UserError: nothing there, or nothing readable; names `config.data.path`.
    """
    if path and path.startswith("tfds:"):
        return TfdsSource(path)
    path = path if not path or files.is_remote(path) else os.path.expanduser(path)
    try:
        kind, found = files.find(path)
    except OSError as e:  # A store that refuses; local folders answer with "does not exist".
        raise UserError(f"config.data.path={path!r} cannot be read ({e}): check it and this account's rights") from e
    if kind == "tars":
        return TarSource(found, cache_dir, quiet)
    return FolderSource(found, path if files.is_folder(path) else "")
