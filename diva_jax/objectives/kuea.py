"""KUEA (arXiv 2506.02557): the kernel of an encoder's embeddings is aligned with that of a frozen DINOv2.

For a batch of B images: f = vision(u), f0 the same of a frozen copy of the initial encoder, g = teacher(v), all pooled
and not normalised. With kernels K over all pairs of the batch,
  loss = clean_weight * mean_i |f_i - f0_i|^2 + kernel_weight * mean_ij (K_f[i, j] - K_g[i, j])^2.
There is no diffusion model. "faithful" switches are what the authors' code does, see docs/OBJECTIVES.md.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from diva_jax.common.errors import UserError
from diva_jax.common.fields import above, at_least, choice, field, parse
from diva_jax.data import inputs, preprocess
from diva_jax.models import backbones
from diva_jax.models.layers import Array, widened
from diva_jax.objectives import contract
from diva_jax.objectives.contract import EXACT, FAITHFUL, switch
from diva_jax.objectives.shared import pairs
from diva_jax.weights import parts


@dataclasses.dataclass(frozen=True)
class KueaOptions:
    """`config.kuea`. "faithful" is what the authors' code does."""

    kernel: str = choice(("polynomial", "gaussian", "cosine"), "The kernel of pairs of embeddings.")
    gamma: float = field(
        0.0032,
        "The polynomial kernel is (gamma a.b + c)^3, normalised to 1 on the diagonal; only gamma/c matters.",
        above(0),
    )
    c: float = field(0.191623, "This is c in the polynomial kernel, see gamma.", above(0))
    teacher_gamma: float = field(0.0, "Gamma in the teacher's kernel; 0: 1 / its embed_dim.", at_least(0))
    teacher_c: float = field(1.0, "This is c in the teacher's kernel.", above(0))
    width: float = field(8.7, "The gaussian kernel is exp(-|a - b|^2 / (2 width^2)).", above(0))
    teacher_width: float = field(15.8, "This is the width in the teacher's gaussian kernel.", above(0))
    clean_weight: float = field(1.0, "The distance to the initial encoder's embedding is weighted with this.")
    kernel_weight: float = field(0.5, "The distance of the kernels is weighted with this.")
    kernel_params: str = switch("The polynomial kernel's gamma and c are trained (exact), or constant (faithful).")
    first_step_lr: str = switch(
        "The warm-up holds from the first step on (exact), or the first step has the peak learning rate (faithful)."
    )
    teacher_norm: str = switch("The teacher's input has its own mean and std (exact), or the backbone's (faithful).")
    teacher_resize: str = switch("The teacher's input is made of the image (exact), or the backbone's view (faithful).")
    teacher_crop_from: int = field(
        256, "With teacher_resize=exact, images are resized to this before the crop [pixels].", at_least(0)
    )
    teacher: backbones.Spec = backbones.DINOV2_L

    @property
    def trains_kernel(self) -> bool:
        """Whether gamma and c are trained."""
        return self.kernel == "polynomial" and self.kernel_params == EXACT


SECTION = KueaOptions


def recipe(config: ConfigDict) -> None:
    """The published recipe: 40,000 steps of 64 ImageNet images (two epochs), float32, no clip."""
    config.steps, config.batch_size = 40_000, 64
    config.dtype = config.frozen_dtype = "float32"
    config.trainable = (("vision/.*", 1.0), (".*", 0.0))
    config.optim.update(name="adamw", lr=1e-5, weight_decay=1e-4, decay_all=True, warmup=0.07, clip=0.0)
    config.optim.no_decay = "kernel_params"


def stages(config: ConfigDict) -> tuple[contract.Stage, ...]:
    """One stage: `config.trainable`, and gamma and c where they are trained; the learning rate is open_clip's. With W
    steps of warm-up, as `config.optim` says: peak * (s + 1) / W before step W, then as its `schedule` says, of which
    the cosine is 0 at the end."""
    options, stage = parse(KueaOptions, config.kuea, "config.kuea"), contract.tune(config)
    warm = config.optim.warmup_steps
    if warm < 0:
        warm = math.ceil(config.optim.warmup * stage.steps - 1e-6)

    def rate(step: Array, pace: contract.Pace) -> Array:
        up = pace.peak * (step + 1) / jnp.maximum(pace.warm, 1)
        down = 0.5 * pace.peak * (1 + jnp.cos(jnp.pi * (step - pace.warm) / (pace.steps - pace.warm)))
        lr = jnp.where(step < pace.warm, up, pace.peak if config.optim.schedule == "constant" else down)
        return jnp.where(step == 0, pace.peak, lr) if options.first_step_lr == FAITHFUL else lr

    rows = (("kernel_params", 1.0),) if options.trains_kernel else ()
    return (stage._replace(trainable=(*rows, *stage.trainable), rate=rate, warmup_steps=warm),)


def _products(x: Array) -> tuple[Array, Array]:
    """[B, D] -> (inner products of all pairs [B, B], squared norms [B]), in float32 or wider."""
    return jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST), jnp.sum(x * x, axis=-1)


def polynomial(x: Array, gamma: float | Array, c: float | Array) -> Array:
    """k(a, b) / sqrt(k(a, a) k(b, b)) with k(a, b) = (gamma a.b + c)^3, of all pairs: [B, D] -> [B, B]."""
    products, squares = _products(x)
    scale = jax.lax.rsqrt(gamma * squares + c)
    return ((gamma * products + c) * scale[:, None] * scale) ** 3


def gaussian(x: Array, width: float) -> Array:
    """exp(-|a - b|^2 / (2 width^2)) of all pairs: [B, D] -> [B, B]."""
    products, squares = _products(x)
    return jnp.exp((2 * products - squares[:, None] - squares) / (2 * width**2))


class Objective(contract.Objective):
    """`vision` is what is trained, and `kernel_params` (gamma, c) where `config.kuea.kernel_params` is exact."""

    compares_images = True

    def __init__(self, config, *, rngs):
        self.spec, self.options = backbones.spec_of(config), parse(KueaOptions, config.kuea, "config.kuea")
        self.taught_by = backbones.check(self.options.teacher, "config.kuea.teacher")
        if self.options.teacher_resize == EXACT and self.options.teacher_crop_from < self.taught_by.image_size:
            given, least = self.options.teacher_crop_from, self.taught_by.image_size
            raise UserError(f"config.kuea.teacher_crop_from={given} must be at least the teacher's image_size, {least}")
        self.vision = contract.vision_tower(config, self.spec, rngs)
        kw = dict(rngs=rngs, dtype=jnp.dtype(config.dtype), param_dtype=jnp.dtype(config.frozen_dtype))
        self.original, self.teacher = backbones.build(self.spec, **kw), backbones.build(self.taught_by, **kw)
        if self.options.trains_kernel:
            self.kernel_params = nnx.Param(jnp.asarray([self.options.gamma, self.options.c], jnp.float32))

    @property
    def inputs(self) -> Mapping[str, inputs.Prepared]:
        """{"image": uint8 [S, S, 3]}; with `teacher_resize` exact also "teacher", at the teacher's resolution."""
        s, t = self.spec, self.taught_by
        batch = {"image": inputs.Prepared(s.image_size, s.resize_mode, s.interpolation)}
        if self.options.teacher_resize == EXACT:
            crop_from = self.options.teacher_crop_from if t.resize_mode == "shortest" else 0
            batch["teacher"] = inputs.Prepared(t.image_size, t.resize_mode, t.interpolation, crop_from)
        return batch

    def pretrained(self) -> Mapping[str, parts.Part]:
        """See `contract.Objective`; `kernel_params` have no source, `original` has that of `vision`."""
        own = parts.vision(self.spec.source, self.spec)
        taught_by = parts.vision(self.taught_by.source, self.taught_by, "config.kuea.teacher")
        return {"vision": own, "original": own, "teacher": taught_by}

    def teacher_view(self, pixels: Array) -> Array:
        """Pixels [B, S, S, 3] in [0, 1] -> the teacher's input [B, T, T, 3]: resized where S is not T, normalised."""
        size, like = self.taught_by.image_size, self.taught_by if self.options.teacher_norm == EXACT else self.spec
        if pixels.shape[1] != size:
            pixels = preprocess.resize(pixels, size, "cubic", antialias=True)
        return preprocess.normalise(pixels, like.mean, like.std)

    def kernels(self, f: Array, g: Array) -> tuple[Array, Array]:
        """Embeddings of the backbone [B, D] and the teacher [B, D'] -> their kernels, each [B, B]."""
        o = self.options
        if o.kernel == "gaussian":
            return gaussian(f, o.width), gaussian(g, o.teacher_width)
        if o.kernel == "cosine":
            return pairs.cosines(f, f), pairs.cosines(g, g)
        gamma, c = self.kernel_params[...] if o.trains_kernel else (o.gamma, o.c)
        return polynomial(f, gamma, c), polynomial(g, o.teacher_gamma or 1 / g.shape[-1], o.teacher_c)

    def forward(self, pixels: Array, teacher_pixels: Array) -> tuple[Array, dict[str, Array]]:
        """The loss of pixels [B, S, S, 3] in [0, 1] before the backbone's normalisation, and [B, S', S', 3] before
        `teacher_view`. Returns (loss, {f, f0 [B, D], g [B, D'], k_clip, k_dino [B, B], loss_clean, loss_kernel []})."""
        view = preprocess.normalise(pixels, self.spec.mean, self.spec.std)
        f, f0 = (widened(self.encode(view, tower).pooled) for tower in ("vision", "original"))
        g = widened(self.encode(self.teacher_view(teacher_pixels), "teacher").pooled)
        f0, g = jax.lax.stop_gradient((f0, g))
        k_clip, k_dino = self.kernels(f, g)
        clean = jnp.mean(jnp.sum(jnp.square(f - f0), axis=-1))
        kernel = jnp.mean(jnp.square(k_clip - k_dino))
        seen = dict(f=f, f0=f0, g=g, k_clip=k_clip, k_dino=k_dino, loss_clean=clean, loss_kernel=kernel)
        return self.options.clean_weight * clean + self.options.kernel_weight * kernel, seen

    def loss(self, batch: Mapping[str, Array], keys: Array) -> tuple[Array, dict[str, Array]]:
        """See `contract.Objective`; the keys are not used; the metrics are "loss", "loss_clean" and "loss_kernel"."""
        pixels = preprocess.to_float(batch["image"])
        value, seen = self.forward(pixels, preprocess.to_float(batch["teacher"]) if "teacher" in batch else pixels)
        return value, {"loss": value, "loss_clean": seen["loss_clean"], "loss_kernel": seen["loss_kernel"]}
