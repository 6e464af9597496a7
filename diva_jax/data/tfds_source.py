"""Records of prepared tfds datasets, read without TensorFlow."""

from collections.abc import Mapping
from urllib.parse import parse_qsl

from diva_jax.common.errors import UserError, listing
from diva_jax.data.records import TEXT_COLUMNS, Record, caption


class TfdsSource:
    """The records of a prepared tfds dataset in array_record format: `tfds:name/split`.

    `name` may have a config and a version (`coco/2017:1.1.0`) and `split` a slice (`train[:10%]`). After a `?`:
    `data_dir=...` for another folder than the default of tfds, `image=...` to choose among several image features,
    `text=...` for the captions (one of `TEXT_COLUMNS` if not given), and the options in `defaults`. A UserError, which
    names `flag`, where the dataset is not there, not in this format, has no records or no such features.
    """

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
        try:
            builder = tfds.builder(name, data_dir=self.options.get("data_dir"))
            self.features = builder.info.features
            self._image = self._image_feature(tfds)
            self._text = self._text_feature()
            # The encoded bytes: decoding and its errors belong to the pipeline.
            decoders = {self._image: tfds.decode.SkipDecoding()}
            self._records = builder.as_data_source(split=split, decoders=decoders)
        except UserError:
            raise
        except Exception as e:  # tfds raises a different type for each of missing name, split, folder, format.
            why = " ".join(str(e).split())[:600].rstrip(".:") or type(e).__name__
            raise UserError(
                f"{self._where} cannot be read ({why}): prepare it first with "
                "tfds.builder(name, file_format='array_record').download_and_prepare()"
            ) from e
        if not len(self):
            raise UserError(f"{self._where} has no records")

    def _image_feature(self, tfds) -> str:
        images = [key for key, feature in self.features.items() if type(feature) is tfds.features.Image]
        wanted = self.options.get("image")
        if wanted and wanted not in images:
            raise self._lacks(f"image feature {wanted!r}", images, "image")
        if not wanted and len(images) != 1:
            raise UserError(
                f"{self._where} has {len(images)} image features ({listing(images)}): choose one with ?image=..."
            )
        return wanted or images[0]

    def _text_feature(self) -> str | None:
        wanted = self.options.get("text")
        if wanted and wanted not in self.features:
            raise self._lacks(f"feature {wanted!r}", self.features, "text")
        return wanted or next((key for key in TEXT_COLUMNS if key in self.features), None)

    def _lacks(self, what: str, there, option: str) -> UserError:
        return UserError(
            f"{self._where} cannot be read: it has no {what}, only {listing(list(there))}: choose with ?{option}=..."
        )

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
        text = caption(record[self._text]) if with_text and self._text else None
        return Record(self.name(i), record[self._image], text)

    def labels(self, feature: str) -> tuple[list[int], list[str]]:
        """(the label of each record, the names of the classes) of a class label; a UserError where there is none."""
        names = getattr(self.features[feature], "names", None) if feature in self.features else None
        if names is None:
            raise self._lacks(f"class label {feature!r}", self.features, "label")
        return [int(record[feature]) for record in self._records], list(names)
