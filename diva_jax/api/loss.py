"""The loss of an objective and its gradients, on a user's batch, for loops and studies of one's own."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diva_jax import config as configs
from diva_jax.api.encoder import ImageLike, as_image, mapping, named
from diva_jax.common.errors import UserError, listing
from diva_jax.data.images import sample_box
from diva_jax.data.inputs import Example
from diva_jax.data.sources import listed
from diva_jax.training import partition, workdirs
from diva_jax.training.step import Program, image_keys


class Result(NamedTuple):
    """The loss of a batch."""

    loss: float  # The scalar that is differentiated.
    metrics: dict[str, float]  # Name -> value, as the train loop logs them.
    gradients: dict[str, jax.Array]  # Name -> array of the shape of the parameter, float32.


class Loss:
    """An objective with its weights loaded; `objective` makes one.

    Attributes:
      config: the config.
      inputs: name -> (shape of one example, dtype), what a batch holds.
      params: name -> array of the parameters that some stage of the config trains.
      frozen: name -> array of all others.
    """

    def __init__(self, config: ConfigDict):
        configs.validate(config, 1)
        self.config = config
        self._mesh = partition.make_mesh(config.mesh)
        self._program = Program(config, self._mesh)
        arrays, _ = workdirs.initial_arrays(self._program)
        trained = set(self._program.trained)
        self.params = {n: a for n, a in arrays.items() if n in trained}
        self.frozen = {n: a for n, a in arrays.items() if n not in trained}
        self._inputs = self._program.objective.inputs
        self.inputs = {name: (i.shape, i.dtype) for name, i in self._inputs.items()}
        self._make = {name: i.open(config.data) for name, i in self._inputs.items()}
        self._key = jax.random.key_data(jax.random.fold_in(jax.random.key(config.seed), 1))
        self._compute = jax.jit(self._trace)

    @named()
    def batch(
        self, images: Sequence[ImageLike], texts: Sequence[str | Sequence[str]] | None = None, seed: int = 0
    ) -> dict[str, np.ndarray]:
        """Makes a batch as the data pipeline does: one random crop of each image, at the size that each input has.

        Args:
          images: what `Encoder.preprocess` takes, each.
          texts: as many captions, for objectives that read them, or lists of texts that differ in one fact.
          seed: of the crops and of whatever the inputs draw.

        Returns:
          name -> array [B, *shape].

        Raises:
          UserError: an image cannot be read, or texts are missing.
        """
        texts = [None] * len(images) if texts is None else list(texts)
        needing = [name for name, i in self._inputs.items() if i.needs_text]
        if len(texts) != len(images) or (needing and not all(texts)):
            what = listing(needing) or "a batch"
            raise UserError(f"{len(images)} images need as many texts, none of them empty, for {what}")
        c, rows = self.config.data.crop, []
        for i, (given, text) in enumerate(zip(images, texts, strict=True)):
            image, rng = as_image(given).convert("RGB"), np.random.default_rng((seed, i))
            box = sample_box(rng, *image.size, tuple(c.scale), tuple(c.ratio))
            one = text is None or isinstance(text, str)
            try:
                example = Example(image, text if one else None, box, rng, texts=None if one else listed(text))
            except ValueError as e:
                raise UserError(f"image {i}: {e}") from e
            for choice in (made.alternatives for made in self._inputs.values() if hasattr(made, "alternatives")):
                if not choice(example, np.random.default_rng(0)):
                    raise UserError(f"image {i} needs {choice.wanted}: give it in texts")
            rows.append({name: make(example) for name, make in self._make.items()})
        return {name: np.stack([row[name] for row in rows]) for name in self._inputs} if rows else {}

    def _trace(self, params, frozen, batch, key, step):
        with self._program.tracing():
            keys = image_keys(key, step, batch["row"])

            def loss(params):
                return self._program.skeleton.merge(params, frozen).loss(batch, keys)

            (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params)
            return value, metrics, gradients

    @named()
    def __call__(
        self, batch: Mapping[str, Any], params: Mapping[str, jax.Array] | None = None, step: int = 0
    ) -> Result:
        """Computes the loss of a batch and its gradients with respect to the trained parameters.

        The batch is one micro-batch. With the same config, step and rows the random draws are those of training.

        Args:
          batch: each input as [B, *shape], B a multiple of the number of devices; optionally "row", int32 [B], the
            rows of the images in the global batch (default 0 to B - 1), from which their random draws follow.
          params: other values than `self.params`, of all its names.
          step: another step has other random draws.

        Raises:
          UserError: an input or a parameter is missing, or has another shape or dtype.
        """
        batch, params = self._checked(batch), self._complete(params)
        batch = jax.device_put(batch, jax.sharding.NamedSharding(self._mesh, partition.BATCH))
        value, metrics, gradients = self._compute(params, self.frozen, batch, self._key, jnp.int32(step))
        return Result(float(value), {name: float(v) for name, v in metrics.items()}, gradients)

    def _complete(self, params: Mapping[str, jax.Array] | None) -> dict[str, jax.Array]:
        """All parameters; a UserError where one is missing or unknown, of another shape or not of floats."""
        given = self.params if params is None else mapping("params", params, "Loss.params")
        wrong = [f"lacks {n}" for n in self.params if n not in given]
        wrong += [f"has {n}" for n in given if n not in self.params]
        for name in self.params.keys() & given.keys():
            want, shape, dtype = self.params[name].shape, np.shape(given[name]), getattr(given[name], "dtype", object)
            if shape != tuple(want) or not jnp.issubdtype(dtype, np.floating):
                wrong.append(f"has {name} as {np.dtype(dtype)} {list(shape)} and not as floats {list(want)}")
        if wrong:
            raise UserError(f"params {listing(sorted(wrong), 5)}: give all of Loss.params, with values of your own")
        return given

    @named()
    def towers(self, params: Mapping[str, jax.Array] | None = None) -> dict[str, jax.Array]:
        """Computes the tuned model, with adapters merged: for `Encoder.with_params` and `export`.

        Args:
          params: other values than `self.params`, of all its names.

        Returns:
          name -> array, of whole towers: "vision/NAME", and where the objective tunes them "text/NAME", "logit_scale"
          and "logit_bias".

        Raises:
          UserError: a parameter is missing, or has another shape or dtype.
        """
        out = {}
        for tower, arrays in self._program.towers({**self.frozen, **self._complete(params)}).items():
            out |= {name if name == tower else f"{tower}/{name}": array for name, array in arrays.items()}
        return out

    def _checked(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        if missing := [name for name in self.inputs if name not in batch]:
            raise UserError(f"the batch lacks {listing(missing)}: it must have {self._described()}")
        if strange := [name for name in batch if name not in (*self.inputs, "row")]:
            raise UserError(f"the batch has {listing(strange)}, which is no input: it must have {self._described()}")
        size = len(batch[next(iter(self.inputs))])
        arrays = {"row": np.arange(size, dtype=np.int32)} | {name: np.asarray(a) for name, a in batch.items()}
        for name, (shape, dtype) in {**self.inputs, "row": ((), np.dtype(np.int32))}.items():
            if arrays[name].shape != (size, *shape) or arrays[name].dtype != dtype:
                problem = f"the input {name} is {arrays[name].dtype} {list(arrays[name].shape)}"
                raise UserError(f"{problem}: give {dtype} {[size, *shape]}, as Loss.batch makes it from images")
        devices = self._mesh.size
        if not size or size % devices:
            raise UserError(f"a batch of {size} cannot be split over {devices} devices: give a multiple of {devices}")
        return arrays

    def _described(self) -> str:
        return ", ".join(f"{name} ({dtype} [B, {', '.join(map(str, s))}])" for name, (s, dtype) in self.inputs.items())
