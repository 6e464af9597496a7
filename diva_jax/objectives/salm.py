"""SALM (arXiv 2610.07689): the vision tower takes on the structure of DINOv2's patch tokens, from images alone.

No code of the authors could be read; docs/OBJECTIVES.md says what is known and what is decided here. For an image, f
are the projected patch tokens and the pooled embedding of the tuned tower, f0 those of the untuned one, and g the P
patch tokens of a frozen teacher (`config.teacher`) on the same grid:

  preserve        mean((f - f0)^2);
  cosines         mean_ij((cos(f_i, f_j) - cos(g_i, g_j))^2) over pairs of patches;
  norms           mean_ij((d_ij - d'_ij)^2), d_ij being |f_i| - |f_j| divided by its deviation over all pairs of the
                  image, d' the same of g; this is mean_i((z_i - z'_i)^2), z being the z-scores of the norms;
  reconstruction  mean((adapter(f, visible g)_i - g_i)^2) over the masked patches i;
  uniformity      log mean_{a != b} exp(-2 |x_a - x_b|^2), x being the unit pooled embeddings of the batch's images
                  (arXiv 2005.10242);
  loss = preserve_weight preserve + beta reconstruction + gamma (cosines + norms) + uniformity_weight uniformity.

With `teacher=self` there is no reconstruction: the adapter fills masked patch tokens of an early layer of the tuned
tower, and their structure is aligned with that of the same layer of the moving average of the tower (`config.ema`).
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from diva_jax.common.errors import UserError
from diva_jax.common.fields import Rule, between, choice, field, finite, parse
from diva_jax.data import inputs, preprocess
from diva_jax.models import backbones
from diva_jax.models.backbones.shared.transformer import blocks, run
from diva_jax.models.layers import Array, Layers, widened
from diva_jax.objectives import contract
from diva_jax.objectives.shared import pairs
from diva_jax.weights import parts

FROZEN, SELF = "frozen", "self"
_FLOOR = 1e-6  # Added to the variance of norms.
_TWO = Rule(lambda v: len(v) == 2 and all(finite(x) and x >= 0 for x in v), "must be two numbers of at least 0")


@dataclasses.dataclass(frozen=True)
class AdapterOptions:
    """`config.salm.adapter`."""

    layers: int = field(4, "The blocks of the adapter.", between(1, 1024))
    width: int = field(512, "Its width.", between(1, 2**20))
    heads: int = field(8, "The heads of its attention.", between(1, 1024))
    visible: str = choice(
        ("added", "none"),
        "The teacher's tokens that are not masked are added to what the adapter sees (added), or it sees the tuned "
        "tower's tokens alone (none).",
    )


@dataclasses.dataclass(frozen=True)
class SalmOptions:
    """`config.salm`."""

    teacher: str = choice(
        (FROZEN, SELF),
        "The teacher is config.teacher (frozen), or the moving average of the tuned tower, whose decay is "
        "config.ema's (self).",
    )
    layer: int = field(6, "With teacher=self, the tokens are those after this block.", between(1, 1024))
    mask: float = field(0.75, "This share of the patches is masked.", between(0, 1))
    preserve_weight: float = field(5.0, "The distance to the untuned tower is weighted with this.", between(0, 1e38))
    beta: tuple[float, float] = field((0.0, 1.0), "The reconstruction's weight in the first and last quarter.", _TWO)
    gamma: tuple[float, float] = field((1.0, 0.1), "The alignment's weight in the first and last quarter.", _TWO)
    curriculum: bool = field(True, "Whether weights change linearly over quarters two and three; if not, the last.")
    uniformity_weight: float = field(0.01, "The uniformity of embeddings is weighted with this.", between(0, 1e38))
    adapter: AdapterOptions = AdapterOptions()


SECTION = SalmOptions


def recipe(config: ConfigDict) -> None:
    """The published recipe: four epochs of ImageNet-1K at 16 per step; the teacher has the backbone's grid."""
    config.steps, config.batch_size = 320_292, 16
    config.trainable = (("(vision|adapter)/.*", 1.0), (".*", 0.0))
    config.optim.update(name="adamw", lr=1e-5, weight_decay=0.05)
    config.teacher.image_size = config.backbone.image_size // config.backbone.patch_size * config.teacher.patch_size


def validate(config: ConfigDict) -> None:
    """Raises a UserError for fields that do not fit together."""
    o, spec = parse(SalmOptions, config.salm, "config.salm"), backbones.spec_of(config)
    if o.adapter.width % o.adapter.heads:
        raise UserError(f"config.salm.adapter.heads={o.adapter.heads} must divide its width, {o.adapter.width}")
    if o.teacher == FROZEN and (grid := backbones.spec_of(config, "teacher").grid) != spec.grid:
        problem = f"config.teacher sees {grid} x {grid} patches and config.backbone {spec.grid} x {spec.grid}"
        raise UserError(f"{problem}: set config.teacher.image_size={spec.grid * config.teacher.patch_size}")
    if o.teacher == SELF:
        if spec.arch != "vit" or o.layer > spec.layers:
            problem = f"config.salm.teacher=self needs a vit backbone of at least config.salm.layer={o.layer} blocks"
            raise UserError(f"{problem}, and it is {spec.arch} with {spec.layers}: set config.salm.teacher=frozen")
        if not config.ema.decay:
            raise UserError("config.salm.teacher=self learns from its moving average: set config.ema.decay, e.g. 0.999")


class Adapter(nnx.Module):
    """Patch tokens [B, P, n_in], and where they are seen the teacher's [B, P, n_out], -> [B, P, n_out]."""

    def __init__(self, o: AdapterOptions, n_in: int, n_out: int, patches: int, make: Layers, remat: bool = False):
        near_zero = nnx.initializers.normal(0.02)
        self.remat = remat
        self.fc_in, self.fc_out = make.linear(n_in, o.width), make.linear(o.width, n_out)
        self.fc_seen = make.linear(n_out, o.width) if o.visible == "added" else None
        self.mask_token = make.param(near_zero, o.width)
        self.pos_embed = make.param(near_zero, patches, o.width)
        self.blocks = blocks(make, o.layers, o.width, o.heads, 4 * o.width, "gelu", 1e-6)
        self.norm = make.layer_norm(o.width, 1e-6)

    def __call__(self, tokens: Array, masked: Array, seen: Array | None = None) -> Array:
        """Masked patches, bool [B, P], have the mask token in place of `seen`; without it, in place of `tokens`."""
        x = self.fc_in(tokens)
        mask, masked = self.mask_token[...].astype(x.dtype), masked[..., None]
        if seen is None:
            x = jnp.where(masked, mask, x)
        elif self.fc_seen is not None:
            x = x + jnp.where(masked, mask, self.fc_seen(seen.astype(x.dtype)))
        return self.fc_out(self.norm(run(self.blocks, x + self.pos_embed[...].astype(x.dtype), remat=self.remat)))


def structure(tokens: Array, taught: Array) -> tuple[Array, Array]:
    """(cosines, norms), see above, of tokens [B, P, D] and [B, P, D'], in float32 or wider."""

    def parts_of(x):
        length = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1))
        unit = pairs.unit(x)
        cosines = jnp.einsum("bpd,bqd->bpq", unit, unit, precision=jax.lax.Precision.HIGHEST)
        centred = length - jnp.mean(length, axis=1, keepdims=True)
        return cosines, centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=1, keepdims=True) + _FLOOR)

    return tuple(jnp.mean(jnp.square(a - b)) for a, b in zip(parts_of(tokens), parts_of(taught), strict=True))


def uniformity(x: Array) -> Array:
    """The logarithm of the mean over pairs of different rows of [B, D] of exp(-2 |n(x_a) - n(x_b)|^2), |n(x)| = 1."""
    others = ~jnp.eye(len(x), dtype=bool)
    return jax.nn.logsumexp(4 * (pairs.cosines(x, x) - 1), where=others) - jnp.log(len(x) * (len(x) - 1))


class Objective(contract.Objective):
    """`vision` and `adapter` are trained; `original` is what `vision` was, `teacher` is frozen."""

    compares_images, follows_run = True, True

    def __init__(self, config, *, rngs):
        self.spec, self.options = backbones.spec_of(config), parse(SalmOptions, config.salm, "config.salm")
        self.vision = contract.vision_tower(config, self.spec, rngs)
        kw = dict(rngs=rngs, dtype=jnp.dtype(config.dtype), param_dtype=jnp.dtype(config.frozen_dtype))
        self.original = backbones.build(self.spec, **kw)
        self.held, self.cached, self.taught_by = (config.dtype, config.frozen_dtype), bool(config.data.latents), None
        adapter, sizes = dataclasses.replace(self.options.adapter, visible="none"), (self.spec.width, self.spec.width)
        if self.options.teacher == FROZEN:
            self.taught_by = backbones.spec_of(config, "teacher")
            self.teacher = None if self.cached else backbones.build(self.taught_by, **kw)
            adapter, sizes = self.options.adapter, (self.spec.embed_dim, self.taught_by.embed_dim)
        remat = config.remat in ("vision", "all")
        self.adapter = Adapter(adapter, *sizes, self.spec.patches, Layers(rngs, jnp.dtype(config.dtype)), remat)

    @property
    def inputs(self) -> Mapping[str, inputs.Input]:
        """{"image": uint8 [S, S, 3], a random crop}, and "teacher", its tokens, where they are cached."""
        taught = {name: inputs.Cached(c.shape, name) for name, c in self.cacheable.items() if self.cached}
        return {"image": inputs.Image(self.spec.image_size), **taught}

    @property
    def cacheable(self) -> Mapping[str, contract.Cacheable]:
        """{"teacher": the frozen teacher's patch tokens}."""
        spec = self.taught_by
        if spec is None:
            return {}
        facts = {"spec": dataclasses.asdict(dataclasses.replace(spec, source="")), "dtypes": self.held}
        facts["image_size"] = self.spec.image_size
        part = parts.vision(spec.source, spec, "config.teacher")
        make = lambda batch: self.taught(preprocess.to_float(batch["image"]))  # noqa: E731
        return {"teacher": contract.Cacheable((spec.patches, spec.embed_dim), facts, {"teacher": part}, make)}

    def pretrained(self) -> Mapping[str, parts.Part]:
        """See `contract.Objective`; the adapter has no source."""
        own = {name: parts.vision(self.spec.source, self.spec) for name in ("vision", "original")}
        return own | {name: part for c in self.cacheable.values() if not self.cached for name, part in c.parts.items()}

    def taught(self, pixels: Array) -> Array:
        """Pixels [B, S, S, 3] in [0, 1] -> the frozen teacher's patch tokens, [B, P, D']."""
        spec = self.taught_by
        view = preprocess.backbone_view(pixels, spec.image_size, spec.mean, spec.std)
        return self.encode(view, "teacher").tokens

    def masked(self, keys: Array) -> Array:
        """Which patches are masked, bool [B, P]: the same number of each image, from one key per image."""
        count = round(self.options.mask * self.spec.patches)
        return jax.vmap(lambda key: jax.random.permutation(key, self.spec.patches) < count)(keys)

    def weights(self, done: Array | float) -> tuple[Array, Array]:
        """(beta, gamma) after this share of the steps."""
        o = self.options
        ramp = jnp.clip((done - 0.25) / 0.5, 0, 1) if o.curriculum else 1.0
        return tuple(first + (last - first) * ramp for first, last in (o.beta, o.gamma))

    def forward(self, view: Array, masked: Array, taught: Array | None, average: "Objective") -> dict[str, Array]:
        """The terms of the loss without their weights, [], of normalised images [B, S, S, 3], which patches are masked,
        bool [B, P], the frozen teacher's tokens, [B, P, D'], None with teacher=self, and the objective with the moving
        average of its parameters."""
        ours, before = self.encode(view), self.encode(view, "original")
        f, f0 = (widened(jnp.concatenate([x.pooled[:, None], x.tokens], axis=1)) for x in (ours, before))
        found = {"preserve": jnp.mean(jnp.square(f - f0)), "uniformity": uniformity(f[:, 0])}
        if taught is not None:
            tokens, taught = f[:, 1:], widened(taught)
            missed = jnp.mean(jnp.square(widened(self.adapter(ours.tokens, masked, taught)) - taught), axis=-1)
            found["reconstruction"] = jnp.sum(missed * masked) / jnp.maximum(jnp.sum(masked), 1)
        else:
            with jax.named_scope("vision"):
                early = self.vision.encode_early(view, self.options.layer)
            tokens = widened(self.adapter(early, masked))
            with jax.named_scope("average"):
                taught = jax.lax.stop_gradient(widened(average.vision.encode_early(view, self.options.layer)))
        cosines, norms = structure(tokens, taught)
        return found | {"cosines": cosines, "norms": norms}

    def loss(self, batch: Mapping[str, Array], keys: Array, progress: contract.Progress | None = None):
        """See `contract.Objective`; without `progress` the weights are those of the end, and the average is the tower.
        The metrics are "loss", the terms without their weights, "beta" (not with teacher=self) and "gamma"."""
        pixels = preprocess.to_float(batch["image"])
        taught = None
        if self.taught_by is not None:
            taught = batch["teacher"] if self.cached else self.taught(pixels)
        done, average = progress or (1.0, self)
        view = preprocess.normalise(pixels, self.spec.mean, self.spec.std)
        found, o = self.forward(view, self.masked(keys), taught, average), self.options
        beta, gamma = self.weights(done)
        weights = {"preserve": o.preserve_weight, "uniformity": o.uniformity_weight, "reconstruction": beta}
        weights |= {"cosines": gamma, "norms": gamma}
        value = sum(weights[name] * term for name, term in found.items())
        used = {"gamma": gamma} | ({"beta": beta} if "reconstruction" in found else {})
        return value, {"loss": value, **found, **{name: jnp.float32(w) for name, w in used.items()}}
