"""Encoders of images and texts, with weights of any source or of a run; and what the API checks of arguments."""

import copy
import functools
import inspect
import operator
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import UnionType
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from diva_jax import config as configs
from diva_jax.common import errors
from diva_jax.common.errors import UserError, brief
from diva_jax.data import tokenizers
from diva_jax.data.images import eight_bits, prepare, read_file
from diva_jax.evals import Settings, encode
from diva_jax.models import backbones
from diva_jax.training import partition
from diva_jax.weights import origins, parts


def named(*others: str) -> Callable[[Callable], Callable]:
    """Makes a function refuse keywords that neither it nor its `**options` (`others`) has; names those meant."""

    def of(function: Callable) -> Callable:
        parameters = inspect.signature(function).parameters.values()
        known = [p.name for p in parameters if p.kind != p.VAR_KEYWORD and p.name != "self"] + list(others)

        @functools.wraps(function)
        def checked(*args, **keywords):
            if wrong := [name for name in keywords if name not in known]:
                otherwise = f"it has {', '.join(known)}"
                if "fields" in known and not errors.nearest(wrong[0], known):
                    if fields := errors.nearest(wrong[0], configs.declared("diva")):
                        otherwise = f"give fields={{{fields[0]!r}: VALUE}}"
                raise UserError(errors.unknown(f"{function.__name__} has no argument", wrong, known, otherwise))
            return function(*args, **keywords)

        return checked

    return of


def chosen(name: str, value: Any, choices: Collection[str]) -> None:
    """Raises a UserError where a value is none of some choices."""
    if value not in choices:
        owner = f"{name} must be one of {', '.join(choices)} and not"
        raise UserError(errors.unknown(owner, [str(value)], choices, "give one of these"))


def mapping(name: str, value: Any, example: str) -> dict[str, Any]:
    """Returns a mapping with texts as keys as a dict; {} for None. Raises a UserError for anything else."""
    if value is not None and not (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
        raise UserError(f"{name}={brief(value)} is no mapping of names: give {name}={example}")
    return dict(value or {})


def sequence(name: str, value: Any, one: type | UnionType = str) -> Sequence:
    """Returns several items, or one alone, as a sequence; raises a UserError for what is neither."""
    if isinstance(value, one):
        return [value]
    if not isinstance(value, Iterable):
        raise UserError(f"{name}={brief(value)} are no {name}: give one, or a list of them")
    return value if isinstance(value, Sequence) else list(value)  # A pandas series counts by its index, not from 0.


def whole(name: str, value: Any) -> int:
    """Returns a whole number from 0 to 2**31 - 1 as an int; raises a UserError for anything else."""
    advice = "give a whole number from 0 to 2**31 - 1"
    with errors.explained(f"{name}={brief(value)} cannot be used", advice, TypeError, ValueError):
        if not 0 <= (number := operator.index(value)) < 2**31:
            raise ValueError("it is out of range")
    return number


def path(name: str, value: Any) -> str:
    """Returns a path, or another name of a source, as a text; raises a UserError for anything else."""
    if not isinstance(value, str | os.PathLike):
        raise UserError(f"{name}={brief(value)} is no path: give a text, or an object of pathlib")
    return os.fspath(value)


ImageLike = Image.Image | str | os.PathLike | np.ndarray


class Encoder:
    """A vision encoder and, where the weights have one, its text encoder; `load` makes one.

    The numbers are those of `evaluate`: images are prepared as open_clip prepares them.

    Attributes:
      spec: the architecture and the preparation of images, a `backbones.Spec`.
      source: the weights as they were given to `load`, of a run its workdir.
      step: the step of the run's checkpoint; None for weights that are not of a run.
    """

    def __init__(self, source: str, step: int | None, config: ConfigDict, batch_size: int, dtype: str):
        self.source, self.step, self.spec = source, step, backbones.spec_of(config)
        self._config, self._batch_size, self._dtype = config, batch_size, dtype
        self._mesh = partition.make_mesh(config.mesh)
        self._towers: dict[int, encode.Towers] = {}
        self._weights = encode.read(source, step, config, self._mesh)

    def _for(self, count: int) -> encode.Towers:
        """Returns towers for the smallest power of two that holds `count` items, so that few sizes are compiled."""
        batch = min(self._batch_size, 1 << (count - 1).bit_length())
        if batch not in self._towers:
            self._towers[batch] = encode.Towers(self.spec, self._mesh, Settings(batch_size=batch, dtype=self._dtype))
        return self._towers[batch]

    @named()
    def preprocess(self, image: ImageLike) -> np.ndarray:
        """Resizes and crops an image for this encoder. A UserError where it is none, or cannot be read.

        Args:
          image: a PIL image of any mode, a file, or uint8 [H, W, 3]. An array [S, S, 3] is a result, and unchanged.

        Returns:
          uint8 [S, S, 3], S = `spec.image_size`. Normalisation with `spec.mean` and `spec.std` is left to
          `encode_image`, on the device.
        """
        s, made = self.spec, as_image(image)
        if made.size == (s.image_size, s.image_size) and not isinstance(image, Image.Image | str | os.PathLike):
            return np.asarray(made)
        return prepare(made, s.image_size, s.resize_mode, s.interpolation)

    @named()
    def encode_image(self, images: ImageLike | Sequence[ImageLike], normalise: bool = False) -> np.ndarray:
        """Computes the pooled embeddings of images. A UserError as of `preprocess`.

        Args:
          images: a sequence of what `preprocess` takes, one of them, or an array uint8 [N, H, W, 3]. Results of
            `preprocess` pass unchanged.
          normalise: whether embeddings are scaled to length one, in float32.

        Returns:
          float32 [N, D]; N is 1 for one image.

        Raises:
          RunError: an embedding is not finite.
        """
        given = as_images(images)
        if len(given) == 0:
            return np.zeros((0, self.spec.embed_dim), np.float32)
        towers = self._for(len(given))
        embeddings = towers.images(self._weights.vision, lambda i: self.preprocess(given[i]), len(given))["pooled"]
        return self._finished(embeddings, "images", normalise)

    @functools.cached_property
    def _text(self):
        """(tokenizer, parameters of the text tower)."""
        weights, spec = self._weights, self.spec
        if not spec.has_text:
            raise UserError(f"{self.source} is a vision encoder without a text tower: use encode_image")
        if (arrays := weights.text) is None:
            if weights.run:
                weights.run.open_base()  # It must be as it was, as its text tower is that of the run.
            arrays = encode.tower("text", weights.source, spec, self._mesh, self._config.mesh.min_shard)
        return tokenizers.open_tokenizer(spec.text, parts.tokenizer_folder(weights.source, "source")), arrays

    @named()
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
        texts = list(sequence("texts", texts))
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

    @named()
    def with_params(self, params: Mapping[str, jax.Array]) -> "Encoder":
        """Returns an encoder with other values of whole towers, such as those that a loop of one's own has tuned. A
        UserError where a parameter is missing or unknown, of another shape or not of floats.

        Args:
          params: what `Loss.towers` returns: "vision/NAME" or "text/NAME" -> array, with NAME as in `arrays`. A tower
            that is not in it stays, and scales have no part in embeddings.
        """
        towers = origins.whole_towers(mapping("params", params, "Loss.towers()"), self.spec)
        new, min_shard = copy.copy(self), self._config.mesh.min_shard
        placed = {t: encode.put(towers[t], self._mesh, min_shard) for t in ("vision", "text") if t in towers}
        new._weights = self._weights._replace(**placed)
        if "text" in placed:
            new.__dict__.pop("_text", None)
        return new


def as_images(images: ImageLike | Sequence[ImageLike]) -> Sequence[ImageLike]:
    """Returns one image or several as a sequence; see `Encoder.encode_image`."""
    if isinstance(images, np.ndarray | jax.Array) and images.ndim != 1:  # With one axis it holds paths or PIL images.
        if images.ndim not in (3, 4):
            problem = f"an array of images has the shape [N, H, W, 3], not {list(images.shape)}"
            raise UserError(f"{problem}: give PIL images of other modes, Image.fromarray(x)")
        return np.asarray(images) if images.ndim == 4 else np.asarray(images)[None]
    return sequence("images", images, Image.Image | str | os.PathLike)


def as_image(given: ImageLike) -> Image.Image:
    """Returns an image as a PIL image; see `Encoder.preprocess`."""
    if isinstance(given, str | os.PathLike):
        return read_file(given)
    if not isinstance(given, Image.Image) or not all(given.size):
        array = np.asarray(given)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3 or not array.size:
            wanted = "an image is a PIL image, a file or an array uint8 [H, W, 3]"
            raise UserError(f"{wanted}, not {array.dtype} {list(array.shape)}: give {_converted(array)}")
        given = Image.fromarray(array)
    # Pillow's plugins raise many types where an image is read that the caller has only opened.
    with errors.explained("an image cannot be used", "crop it, or scale its pixels to 8 bits", Exception):
        return eight_bits(given)


def _converted(array: np.ndarray) -> str:
    """How an array `x` becomes uint8 [H, W, 3], as Python."""
    if array.ndim != 3 or array.dtype.kind not in "biuf" or not array.size or 3 not in array.shape[::2]:
        return "one of these"
    text = "x" if array.shape[-1] == 3 else "np.moveaxis(x, -3, -1)"
    low, high = array.min(), array.max()
    if array.dtype.kind in "bf" and 0 <= low and high <= 1:
        return f"(255 * {text}).round().astype('uint8')"
    if not (0 <= low and high <= 255):
        return "the image as it is before normalisation, in 0 to 255"
    return text if array.dtype == np.uint8 else f"{text}.round().astype('uint8')"
