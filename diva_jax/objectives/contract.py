"""What an objective is: the one class that the loop, the step, evaluation and export know."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
from flax import nnx

from diva_jax.weights.parts import Part


class Stage(NamedTuple):
    """A run of steps with one trainable set, peak learning rate and schedule; the optimizer starts anew.

    Attributes:
      name: shown in the log.
      start, end: global steps, end exclusive.
      lr: peak.
      trainable: rows as in `config.trainable`: ((regex, learning-rate scale), ...).
      schedule: "cosine" or "constant", see `config.optim.schedule`, whose value it has where it is None.
      warmup_steps: of this stage, see `config.optim.warmup_steps`, whose value it has where it is None.
    """

    name: str
    start: int
    end: int
    lr: float
    trainable: tuple[tuple[str, float], ...]
    schedule: str | None = None
    warmup_steps: int | None = None

    @property
    def steps(self) -> int:
        return self.end - self.start


def tune(config, start: int = 0) -> Stage:
    """The stage that trains `config.trainable` for `config.steps` steps, from step `start` on."""
    table = tuple((str(p), float(s)) for p, s in config.trainable)
    return Stage("tune", start, start + config.steps, config.optim.lr, table)


class Objective(nnx.Module):
    """A loss and the models that it needs. Constructed as `Objective(config, rngs=rngs)` with random weights.

    It does not know about meshes, optimizers, files or other objectives. Its constructor raises a `UserError` where
    the config does not fit together; it runs under `nnx.eval_shape` before anything is loaded.

    Attributes:
      compares_images: whether the loss of an image depends on the other images of its micro-batch (negatives,
        kernels). The step computes such a loss over the whole global micro-batch, whatever the number of devices.
    """

    compares_images: bool = False

    def __init__(self, config, *, rngs):
        raise NotImplementedError

    @property
    def inputs(self) -> Mapping[str, object]:
        """What a batch holds: name -> `data.inputs.Image`, `data.inputs.Tokens` or an object like them.

        The data pipeline, the abstract batch of a compilation and the step follow from it. Each batch also has "row":
        int32 [B], the image's row in the global batch.
        """
        raise NotImplementedError

    def loss(self, batch: Mapping[str, jax.Array], keys: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of one micro-batch.

        Args:
          batch: each input as [B, *shape].
          keys: PRNG keys, one per image, [B]: of the run's seed, the step and the image's row alone.

        Returns:
          (scalar that is differentiated, scalar metrics, among them "loss"). Both are averaged over micro-batches.
        """
        raise NotImplementedError

    def pretrained(self) -> Mapping[str, Part]:
        """Prefix of parameter names -> where these parameters come from; all others keep their initial values.

        The longest prefix wins: {"vision": ..., "teacher/vision": ...}.
        """
        return {}

    def towers(self) -> Mapping[str, nnx.Module]:
        """The tuned model, adapters merged: all that evaluation and export see.

        "vision" has the parameters of `backbones.build(spec)`, "text" (where it is trained) those of
        `backbones.text.Text(spec)`, spec being that of `config.backbone`. "logit_scale" and "logit_bias" are
        `nnx.Param`s of shape []. What is not here is as in `config.backbone.source`.
        """
        return {"vision": self.vision}

    def flops(self) -> float | None:
        """FLOPs of one image in one step of the last stage, counted from shapes, for MFU; None where not counted."""
        return None
