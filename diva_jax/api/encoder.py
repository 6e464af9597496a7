"""Encoders of images and texts, with weights of any source or of a run."""

import functools
import os
from collections.abc import Sequence

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from diva_jax.common.errors import UserError
from diva_jax.data import tokenizers
from diva_jax.data.images import open_image, prepare
from diva_jax.evals import Settings, encode, encoders
from diva_jax.models import backbones
from diva_jax.training import sharding
from diva_jax.weights import parts

ImageLike = Image.Image | str | os.PathLike | np.ndarray


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

    def preprocess(self, image: ImageLike) -> np.ndarray:
        """Resizes and crops an image for this encoder.

        Args:
          image: a PIL image of any mode, a file, or uint8 [H, W, 3].

        Returns:
          uint8 [S, S, 3], S = `spec.image_size`. Normalisation with `spec.mean` and `spec.std` is left to
          `encode_image`, on the device.

        Raises:
          UserError: it is none of these, or the file cannot be read.
        """
        s = self.spec
        return prepare(as_image(image), s.image_size, s.resize_mode, s.interpolation)

    def encode_image(self, images: ImageLike | Sequence[ImageLike], normalise: bool = False) -> np.ndarray:
        """Computes the pooled embeddings of images.

        Args:
          images: a sequence of what `preprocess` takes, one of them, or an array uint8 [N, H, W, 3]. Results of
            `preprocess` pass unchanged.
          normalise: whether embeddings are scaled to length one, in float32.

        Returns:
          float32 [N, D]; N is 1 for one image.

        Raises:
          UserError: as `preprocess`.
          RunError: an embedding is not finite.
        """
        given = _as_sequence(images)
        if len(given) == 0:
            return np.zeros((0, self.spec.embed_dim), np.float32)
        towers = self._for(len(given))
        embeddings = towers.images(self._weights.vision, lambda i: as_image(given[i]), len(given))["pooled"]
        return self._finished(embeddings, "images", normalise)

    @functools.cached_property
    def _text(self):
        """(tokenizer, parameters of the text tower)."""
        weights, spec = self._weights, self.spec
        if not spec.has_text:
            raise UserError(f"{self.source} is a vision encoder without a text tower: use encode_image")
        tokenizer = tokenizers.open_tokenizer(spec.text, parts.tokenizer_folder(weights.source, "source"))
        if weights.text is not None:
            return tokenizer, weights.text
        return tokenizer, encoders.tower("text", weights.source, spec, self._mesh, self._config.mesh.min_shard)

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
        return self._finished(self._for(len(texts)).texts(arrays, tokenizer(texts)), "texts", normalise)

    def _finished(self, embeddings: np.ndarray, what: str, normalise: bool) -> np.ndarray:
        embeddings = encode.require_finite(embeddings, self.source, what)
        return encode.unit(embeddings).astype(np.float32) if normalise else embeddings

    @property
    def arrays(self) -> dict[str, jax.Array]:
        """The parameters of the vision tower by name, as `backbones.build(spec)` has them."""
        return dict(self._weights.vision)


def _as_sequence(images: ImageLike | Sequence[ImageLike]) -> Sequence[ImageLike]:
    if isinstance(images, Image.Image | str | os.PathLike):
        return [images]
    if isinstance(images, np.ndarray | jax.Array):
        if images.ndim not in (3, 4):
            raise UserError(f"an array of images has the shape [N, H, W, 3], not {list(images.shape)}")
        return np.asarray(images).reshape(-1, *images.shape[-3:])
    return images if hasattr(images, "__getitem__") else list(images)


def as_image(given: ImageLike) -> Image.Image:
    """Returns an image as a PIL image; see `Encoder.preprocess`."""
    if isinstance(given, Image.Image):
        return given
    if isinstance(given, str | os.PathLike):
        try:
            with open(given, "rb") as f:
                data = f.read()
        except OSError as e:
            raise UserError(f"the image {os.fspath(given)} cannot be read ({e.strerror}): check the path") from e
        return open_image(data, os.fspath(given))
    array = np.asarray(given)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
        raise UserError(
            f"an image is a PIL image, a file or an array uint8 [H, W, 3], not {array.dtype} {list(array.shape)}: "
            "convert it, e.g. (255 * x).round().astype('uint8')"
        )
    return Image.fromarray(array)
