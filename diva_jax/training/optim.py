"""Optimizer and learning-rate schedule of a stage, from the config."""

import dataclasses
import math
import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import optax

from diva_jax.common.fields import Rule, above, below, between, field, is_regex, one_of
from diva_jax.objectives import Pace, Stage


@dataclasses.dataclass(frozen=True)
class OptimOptions:
    """`config.optim`."""

    name: str = field("sgd", "The optimizer.", one_of("sgd", "adamw"))
    lr: float = field(1e-4, "The peak learning rate.", above(0))
    warmup: float = field(
        0.005, "The learning rate rises from 0 to its peak in this share of a stage's steps, rounded up.", below(0, 1)
    )
    warmup_steps: int = field(
        -1, "The length of the warm-up as a number of steps; -1: as warmup says.", between(-1, 10**9)
    )
    schedule: str = field(
        "cosine",
        "After the warm-up, the learning rate falls to 0 at the stage's end (cosine) or is constant.",
        one_of("cosine", "constant"),
    )
    clip: float = field(1.0, "The gradient's global norm is clipped to this; 0: it is not.", between(0, 1e38))
    momentum: float = field(0.9, "The momentum of sgd.", below(0, 1))
    b1: float = field(0.9, "The decay of adamw's average of gradients.", below(0, 1))
    b2: float = field(0.999, "The decay of adamw's average of squared gradients.", below(0, 1))
    eps: float = field(
        1e-8, "The epsilon of adamw's denominator.", Rule(lambda v: 0 < v <= 1, "must be above 0, at most 1")
    )
    weight_decay: float = field(
        0.0, "The weight decay of adamw (decoupled) and sgd (added to the gradient).", between(0, 1e38)
    )
    decay_all: bool = field(
        False, "Whether biases, norms and all other vectors decay too, and not matrices and convolutions alone."
    )
    no_decay: str = field(
        "",
        "Parameters whose whole name matches this regular expression do not decay.",
        Rule(is_regex, "must be a regular expression"),
    )


def pace(stage: Stage, warmup: float) -> Pace:
    """The numbers of a stage's learning rate, as numpy scalars; a warm-up that it does not give in steps (None or -1)
    is the share `warmup` of its steps, rounded up."""
    given = stage.warmup_steps is not None and stage.warmup_steps >= 0
    warm = min(stage.warmup_steps if given else math.ceil(warmup * stage.steps), stage.steps - 1)
    return Pace(np.float32(stage.lr), np.int32(stage.start), np.int32(stage.steps), np.int32(warm))


def learning_rate(stage: Stage, numbers: Pace) -> optax.Schedule:
    """Linear from 0 to the peak, then as `stage.schedule` says: cosine to 0 at the stage's last step, or constant. The
    argument counts steps from the stage's start. `numbers` are those of `pace`, or traced. A stage with a `rate` of its
    own has that one."""
    if stage.rate is not None:
        return lambda count: stage.rate(count, numbers)

    def rate(count):
        up = numbers.peak * count / jnp.maximum(numbers.warm, 1)
        past = jnp.clip((count - numbers.warm) / (numbers.steps - numbers.warm), 0, 1)
        down = numbers.peak * (0.5 * (1 + jnp.cos(jnp.pi * past))) if stage.schedule != "constant" else numbers.peak
        return jnp.where(count < numbers.warm, up, down)

    return rate


def optimizer(config, lr: optax.Schedule, scales: Mapping[str, float]) -> optax.GradientTransformation:
    """The optax chain of `config.optim`: clip by global norm, SGD with momentum or AdamW, per-parameter scale (name ->
    `scales`). Weight decay reaches matrices and convolutions, and with `decay_all` biases, norms and embeddings of one
    axis, but no parameter whose whole name matches `no_decay`. The optimizer's state does not depend on `lr`."""
    decay, spared = config.weight_decay, re.compile(config.no_decay)

    def mask(params):
        return {n: (config.decay_all or p.ndim > 1) and not spared.fullmatch(n) for n, p in params.items()}

    chain = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    if config.name == "adamw":
        chain.append(optax.adamw(lr, config.b1, config.b2, config.eps, weight_decay=decay, mask=mask))
    else:
        chain += [optax.add_decayed_weights(decay, mask)] if decay else []
        chain.append(optax.sgd(lr, config.momentum or None))
    if any(s != 1 for s in scales.values()):
        chain.append(optax.stateless(lambda updates, _: {n: u * scales[n] for n, u in updates.items()}))
    return optax.chain(*chain)
