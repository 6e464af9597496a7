"""Encoders of images and texts, from any source of weights or from a run."""

import functools
import os
from collections.abc import Sequence

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from diva_jax import config as configs
from diva_jax.common.errors import UserError
from diva_jax.data import images, tokenizers
from diva_jax.evals import Settings, encode, encoders
from diva_jax.models import backbones
from diva_jax.models.backbones import Spec
from diva_jax.training import sharding, workdirs
from diva_jax.weights import origins, parts, places

Picture = Image.Image | str | os.PathLike | np.ndarray


class Encoder:
    """A vision encoder and, where the weights have one, its text encoder; `load` makes one.

    The numbers are those of `evaluate`: images are prepared as open_clip prepares them.

    Attributes:
      spec: the architecture and the preparation of images, a `backbones.Spec`.
      source: the weights as they were given to `load`.
      step: the step of the run's checkpoint; None for weights that are not of a run.
    """

    def __init__(self, source: str, step: int | None, config: ConfigDict, batch_size: int, dtype: str):
        self.source, self.step, self.spec = source, step, backbones.spec_of(config)
        self._config, self._batch_size, self._dtype = config, batch_size, dtype
        self._mesh = sharding.make_mesh(config.mesh)
        self._towers: dict[int, encode.Towers] = {}
        self._weights = encoders.read(source, step, config, self._mesh)

    def _for(self, count: int) -> encode.Towers:
        """Returns towers for the smallest power of two that holds `count` items, so that few sizes are compiled."""
        batch = min(self._batch_size, 1 << (count - 1).bit_length())
        if batch not in self._towers:
            self._towers[batch] = encode.Towers(self.spec, self._mesh, Settings(batch_size=batch, dtype=self._dtype))
        return self._towers[batch]

    def preprocess(self, picture: Picture) -> np.ndarray:
        """Resizes and crops a picture for this encoder.

        Args:
          picture: a PIL image of any mode, a file, or uint8 [H, W, 3].

        Returns:
          uint8 [S, S, 3], S = `spec.image_size`. Normalisation with `spec.mean` and `spec.std` is left to
          `encode_image`, on the device.

        Raises:
          UserError: it is none of these, or the file cannot be read.
        """
        s = self.spec
        return images.prepare(as_picture(picture), s.image_size, s.resize_mode, s.interpolation)

    def encode_image(self, pictures: Picture | Sequence[Picture], normalise: bool = False) -> np.ndarray:
        """Computes the pooled embeddings of pictures.

        Args:
          pictures: a sequence of what `preprocess` takes, one of them, or an array uint8 [N, H, W, 3]. Results of
            `preprocess` pass unchanged.
          normalise: whether embeddings are scaled to length one, in float32.

        Returns:
          float32 [N, D]; N is 1 for one picture.

        Raises:
          UserError: as `preprocess`.
          RunError: an embedding is not finite.
        """
        given = _sequence(pictures)
        if len(given) == 0:
            return np.zeros((0, self.spec.embed_dim), np.float32)
        found = self._for(len(given)).images(self._weights.vision, lambda i: as_picture(given[i]), len(given))["pooled"]
        return _finished(found, self.source, "pictures", normalise)

    @functools.cached_property
    def _text(self):
        """(tokenizer, parameters of the text tower)."""
        weights, spec = self._weights, self.spec
        if not spec.has_text:
            raise UserError(f"{self.source} is a vision encoder without a text tower: use encode_image")
        tokenizer = tokenizers.open_tokenizer(spec.text, parts.tokenizer_folder(weights.source, "source"))
        arrays = weights.text
        if arrays is None:
            arrays = encoders.tower("text", weights.source, spec, self._mesh, self._config.mesh.min_shard)
        return tokenizer, arrays

    def encode_text(self, texts: str | Sequence[str], normalise: bool = False) -> np.ndarray:
        """Computes the embeddings of texts.

        Args:
          texts: one text or several; what is longer than the context of the text tower is cut.
          normalise: whether embeddings are scaled to length one, in float32.

        Returns:
          float32 [N, D]; N is 1 for one text.

        Raises:
          UserError: the weights have no text tower, or no tokenizer.
          RunError: an embedding is not finite.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            return np.zeros((0, self.spec.embed_dim), np.float32)
        if wrong := [t for t in texts if not isinstance(t, str)]:
            raise UserError(f"encode_text takes texts, not {type(wrong[0]).__name__}: give strings")
        tokenizer, arrays = self._text
        return _finished(self._for(len(texts)).texts(arrays, tokenizer(texts)), self.source, "texts", normalise)

    @property
    def arrays(self) -> dict[str, jax.Array]:
        """The parameters of the vision tower by name, as `backbones.build(spec)` has them."""
        return dict(self._weights.vision)


def _finished(found: np.ndarray, label: str, what: str, normalise: bool) -> np.ndarray:
    found = encode.require_finite(found, label, what)
    return encode.unit(found).astype(np.float32) if normalise else found


def _sequence(pictures: Picture | Sequence[Picture]) -> Sequence[Picture]:
    if isinstance(pictures, Image.Image | str | os.PathLike):
        return [pictures]
    if isinstance(pictures, np.ndarray | jax.Array):
        if pictures.ndim not in (3, 4):
            raise UserError(f"an array of pictures has the shape [N, H, W, 3], not {list(pictures.shape)}")
        return np.asarray(pictures).reshape(-1, *pictures.shape[-3:])
    return pictures if hasattr(pictures, "__getitem__") else list(pictures)


def as_picture(given: Picture) -> Image.Image:
    """Returns a picture as a PIL image; see `Encoder.preprocess`."""
    if isinstance(given, Image.Image):
        return given
    if isinstance(given, str | os.PathLike):
        try:
            with open(given, "rb") as f:
                data = f.read()
        except OSError as e:
            raise UserError(f"the picture {os.fspath(given)} cannot be read ({e.strerror}): check the path") from e
        return images.open_image(data, os.fspath(given))
    array = np.asarray(given)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
        raise UserError(
            f"a picture is a PIL image, a file or an array uint8 [H, W, 3], not {array.dtype} {list(array.shape)}: "
            "convert it, e.g. (255 * x).round().astype('uint8')"
        )
    return Image.fromarray(array)


def _config(source: str, step: int | None, spec: Spec | str | None) -> ConfigDict:
    if step is not None:
        config = workdirs.read_config(source)
        if spec is not None:
            raise UserError("spec is for weights without a description: leave it out for a run, which has a config")
    else:
        if isinstance(spec, str) and spec not in backbones.TABLE:
            raise UserError(f"spec={spec!r} is none of {', '.join(backbones.TABLE)}: give one of these, or a Spec")
        row = backbones.TABLE[spec] if isinstance(spec, str) else spec
        config = configs.default(row or origins.open_source(source, "source").described(source))
    with config.unlocked():
        config.mesh.data, config.mesh.fsdp = -1, 1  # All devices of this machine, not those of the run.
        if step is None:
            config.backbone.source = source
    return config


def load(
    source: str | os.PathLike, *, spec: Spec | str | None = None, batch_size: int = 64, dtype: str = "float32"
) -> Encoder:
    """Loads an encoder onto the devices of this process.

    Args:
      source: the workdir of a run, `WORKDIR:STEP` for another checkpoint than the last, or any source of weights: an
        open_clip, OpenAI or transformers file or folder, a hub id.
      spec: for a bare file that does not say what it is: a row of `backbones.TABLE` such as "vitl14", or a Spec.
      batch_size: the largest number of images or texts that are computed at once.
      dtype: compute type, "float32" or "bfloat16".

    Raises:
      UserError: the source is missing, invalid, or of another architecture than `spec`.
    """
    configs.check_runs([os.fspath(source)])
    source, step, _ = places.find(os.fspath(source), "source")
    return Encoder(source, step, _config(source, step, spec), batch_size, dtype)
