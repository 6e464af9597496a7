"""GenHancer, continuous (arXiv 2503.19480): a light denoiser that is conditioned on the image embedding alone.

For an image x: latents z = VAE(x), t = sigmoid(s n), x_t = (1 - t) z + t noise; the embedding e of x goes through two
projectors to the denoiser's pooled condition and to one text token; loss = mean((denoiser(x_t, t, e) - (noise - z))^2)
(section 3.2). Stage 1 trains projectors and denoiser, stage 2 low-rank adapters of the encoder (section 3.3).
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diva_jax.common.errors import UserError
from diva_jax.common.fields import REGEX, at_least, between, choice, field, parse
from diva_jax.data import preprocess
from diva_jax.models import adapters, backbones
from diva_jax.models.diffusion import flow, presets
from diva_jax.models.diffusion.vae import FluxVAEConfig
from diva_jax.models.layers import Array, widened
from diva_jax.objectives import contract
from diva_jax.objectives.contract import EXACT, FAITHFUL, switch
from diva_jax.weights import parts

ONLY, ALL, NONE = "only", "all", "none"

_GENERATOR = (("project_clip/.*", 1.0), ("project_t5/.*", 1.0), ("denoiser/.*", 1.0))


@dataclasses.dataclass(frozen=True)
class GenHancerVae(FluxVAEConfig):
    """`config.genhancer.vae`."""

    source: str = field(
        "black-forest-labs/FLUX.1-schnell",
        "The VAE's weights are in this file ae.safetensors, or a folder with it, or a diffusers folder or hub id.",
    )
    code: str = field(
        "",
        "The LatentCode of this dotted path takes the place of the VAE, with in_channels, latent_channels and "
        "scaling_factor.",
    )


@dataclasses.dataclass(frozen=True)
class GenHancerLora(adapters.Lora):
    """`config.genhancer.lora`."""

    targets: str = field(
        "",
        "The encoder's layers whose path matches this regular expression are adapted; if empty, those of the authors.",
        REGEX,
    )


@dataclasses.dataclass(frozen=True)
class GenHancerOptions:
    """`config.genhancer`. "faithful" is what the authors' code does, "exact" what it is meant to do."""

    stage1_steps: int = field(100_000, "The steps of stage 1, of projectors and denoiser; 0: --init_from.", at_least(0))
    stage1_lr: float = field(1e-4, "The peak learning rate of stage 1; stage 2 has config.optim.lr.", between(0, 1e38))
    stage2: str = choice(
        (ONLY, ALL, NONE),
        "Stage 2 trains the encoder's adapters (only), or projectors and denoiser too (all); none: there is none.",
    )
    latents: str = choice(("sample", "mean"), "Latents are a sample of the VAE's posterior or its mean.")
    scale_factor: float = field(1.0, "This is s in t = sigmoid(s n), n being standard normal.")
    guidance: float = field(4.0, "The denoiser is told this strength of guidance for every image.")
    vae_dtype: str = choice(("float32", "bfloat16"), "The VAE computes and is held in this dtype.")
    time_precision: str = switch(
        "The time t is given in float32 (exact), or t, 1000 t and their codes are rounded to bfloat16 (faithful)."
    )
    warmup: str = switch(
        "The warm-up is that of config.optim, 10 steps (exact), or there is none, as the authors' schedule ignores "
        "it (faithful)."
    )
    siglip_head_out: str = switch("SigLIP's head output is adapted (exact), or its bias alone trained (faithful).")
    siglip_gelu: str = switch("SigLIP's activation is config.backbone.activation (exact), or tanh's GELU (faithful).")
    denoiser: flow.FlowConfig = flow.FlowConfig()
    vae: GenHancerVae = GenHancerVae()
    lora: GenHancerLora = GenHancerLora(dropout=0.1, biases=True)


SECTION = GenHancerOptions


def recipe(config: ConfigDict) -> None:
    """The published recipe (the authors' configuration files)."""
    config.steps, config.batch_size, config.accum = 10_000, 256, 2
    # `stages` makes the rows, as `config.genhancer.stage2` says.
    config.trainable = ()
    config.optim.update(name="adamw", lr=1e-5, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01, clip=1.0)
    config.optim.update(schedule="constant", warmup_steps=10, decay_all=True)
    config.data.image_size = config.backbone.image_size
    config.checkpoint.every = 500


def _lora(config: ConfigDict) -> adapters.Lora:
    own, arch = parse(GenHancerOptions, config.genhancer, "config.genhancer").lora, config.backbone.arch
    if own.targets:
        return own
    if arch not in adapters.TARGETS:
        problem = f"config.genhancer.lora.targets is empty, and the authors adapt no {arch} encoder"
        raise UserError(f"{problem}: name the layers, e.g. {adapters.BLOCKS!r}")
    head_out = arch == "siglip" and config.genhancer.siglip_head_out == EXACT
    return dataclasses.replace(own, targets=adapters.TARGETS[arch] + f"|{adapters.SIGLIP_HEAD}" * head_out)


def stages(config: ConfigDict) -> tuple[contract.Stage, ...]:
    """Stage 1 for stage1_steps, then stage 2 for config.steps; `config.trainable` replaces stage 2's table if given."""
    o = parse(GenHancerOptions, config.genhancer, "config.genhancer")
    rest, out, end = ((".*", 0.0),), [], o.stage1_steps
    warm = 0 if o.warmup == FAITHFUL else None
    if end:
        out.append(contract.Stage("stage1", 0, end, o.stage1_lr, (*_GENERATOR, *rest), warmup_steps=warm))
    if o.stage2 != NONE:
        second = contract.tune(config, end)._replace(name="stage2", warmup_steps=warm)
        adapted = _lora(config).trainable("vision")
        if config.backbone.arch == "siglip" and o.siglip_head_out == FAITHFUL:
            adapted += ((f"vision/{adapters.SIGLIP_HEAD}/bias", 1.0),)
        table = (*adapted, *(_GENERATOR if o.stage2 == ALL else ()), *rest)
        out.append(second if second.trainable else second._replace(trainable=table))
    return tuple(out)


def validate(config: ConfigDict) -> None:
    """Raises a UserError for fields that do not fit together."""
    own = parse(GenHancerOptions, config.genhancer, "config.genhancer")
    if not own.stage1_steps and own.stage2 == NONE:
        raise UserError("config.genhancer.stage1_steps=0 with stage2=none trains nothing: give at least one step")
    size, unit = config.backbone.image_size, 2 * _vae(own.vae).downscale
    if size % unit:
        problem = f"config.backbone.image_size={size} must be a multiple of {unit}, a token of the denoiser"
        raise UserError(f"{problem}: use {max(1, round(size / unit)) * unit}")


def _vae(section: GenHancerVae) -> presets.LatentCode:
    if not section.code:
        return FluxVAEConfig(**{f.name: getattr(section, f.name) for f in dataclasses.fields(FluxVAEConfig)})
    kind = presets.find_code(section.code, "config.genhancer.vae.code")
    return kind.from_dict({n: getattr(section, n) for n in ("in_channels", "latent_channels", "scaling_factor")})


class GenHancerDraws(NamedTuple):
    """The random numbers of B images, standard normal: of the posterior, [B, h, w, z]; of the time, its sigmoid's
    argument, [B]; of the noise of the packed latents, [B, N, 4z]."""

    posterior: Array
    t: Array
    noise: Array


class Objective(contract.Objective):
    """`vision` has adapters where a stage trains them; `project_clip`, `project_t5` and `denoiser` start at random."""

    def __init__(self, config, *, rngs):
        self.spec = backbones.spec_of(config)
        self.options = parse(GenHancerOptions, config.genhancer, "config.genhancer")
        self.vae_config, self.flow_config = _vae(self.options.vae), self.options.denoiser
        if self.flow_config.in_channels != (wanted := 4 * self.vae_config.latent_channels):
            problem = f"config.genhancer.denoiser.in_channels={self.flow_config.in_channels}"
            raise UserError(f"{problem} must be four times config.genhancer.vae.latent_channels, {wanted}")
        dtype = jnp.dtype(config.dtype)
        tower = self.spec
        if tower.arch == "siglip" and self.options.siglip_gelu == FAITHFUL:
            tower = dataclasses.replace(tower, activation="gelu_tanh")
        self.vision = contract.vision_tower(config, tower, rngs)
        if self.options.stage2 != NONE:
            adapters.adapt(self.vision, _lora(config), rngs)
        trains_generator = self.options.stage1_steps or self.options.stage2 == ALL
        held = jnp.float32 if trains_generator else jnp.dtype(config.frozen_dtype)
        layers, f = flow.TorchLayers(rngs, dtype, held), self.flow_config
        self.project_clip = flow.Projector(self.spec.embed_dim, f.vector_dim, layers)
        self.project_t5 = flow.Projector(self.spec.embed_dim, f.text_dim, layers)
        self.denoiser = flow.Flow(f, rngs=rngs, dtype=dtype, param_dtype=held, remat=config.remat == "all")
        part = parts.diffusers(self.options.vae.source, self.vae_config, "config.genhancer.vae")
        held, size, cached = self.options.vae_dtype, self.spec.image_size, config.data.latents
        self.latent_source = contract.LatentSource(self.vae_config, part, size, held, held, cached=bool(cached))
        kw = dict(rngs=rngs, dtype=jnp.dtype(held), param_dtype=jnp.dtype(held))
        self.vae = None if cached else self.vae_config.build(**kw)

    def pretrained(self) -> Mapping[str, parts.Part]:
        """See `contract.Objective`; the encoder and the VAE have a source, the adapters and the denoiser have none."""
        fresh = (adapters.FRESH,) if self.options.stage2 != NONE else ()
        return {"vision": parts.vision(self.spec.source, self.spec, fresh=fresh), **self.latent_source.pretrained}

    def draw(self, keys: Array, latents_shape: tuple[int, int, int]) -> tuple[GenHancerDraws, Array]:
        """(random numbers, keys of the adapters' dropout), from one key per image, [B]."""
        h, w, z = latents_shape

        def one(key):
            posterior, t, noise, drop = jax.random.split(key, 4)
            tokens = ((h // 2) * (w // 2), 4 * z)
            normal = jax.random.normal
            return GenHancerDraws(normal(posterior, latents_shape), normal(t, ()), normal(noise, tokens)), drop

        return jax.vmap(one)(keys)

    def latents(self, pixels: Array, posterior: Array, moments: Array | None = None) -> Array:
        """[B, R, R, 3] in [0, 1] or, where they are given, the posterior's moments [B, h, w, 2 z], and standard normal
        noise -> latents [B, h, w, z], float32."""
        moments = self.moments(pixels) if moments is None else moments
        noise = posterior if self.options.latents == "sample" else None
        return jax.lax.stop_gradient(self.vae_config.latents(moments, noise))

    def forward(self, pixels: Array, latents: Array, drawn: GenHancerDraws, freqs: np.ndarray | None = None):
        """The loss of pixels [B, R, R, 3] in [0, 1] with latents [B, h, w, z], and everything on the way to it. `freqs`
        are those of the denoiser's `timestep_code`. Returns (mean over everything of the squared error, {embed [B, d];
        vec [B, 768]; txt [B, 1, 4096]; t [B]; packed, x_t, target and pred [B, N, 4z]; and dit.NAME of the denoiser's
        intermediate results})."""
        embed = self.encode(preprocess.normalise(pixels, self.spec.mean, self.spec.std)).pooled
        vec, txt = self.project_clip(embed), self.project_t5(embed)[:, None]
        packed = flow.pack(latents)
        t = jax.nn.sigmoid(self.options.scale_factor * drawn.t)
        noisy = (1 - t[:, None, None]) * packed + t[:, None, None] * drawn.noise
        seen = {"embed": embed, "vec": vec, "txt": txt, "packed": packed, "t": t, "x_t": noisy}
        given = [t, jnp.full_like(t, self.options.guidance)]
        if self.options.time_precision == FAITHFUL:
            given = [x.astype(jnp.bfloat16) for x in given]
        grid = (latents.shape[1] // 2, latents.shape[2] // 2)
        with jax.named_scope("denoiser"):
            note = lambda name, value: seen.__setitem__(f"dit.{name}", value)  # noqa: E731
            pred = widened(self.denoiser(noisy, *given, vec, txt, grid, freqs, note))
        seen |= {"target": drawn.noise - packed, "pred": pred}
        return jnp.mean(jnp.square(pred - seen["target"])), seen

    def loss(self, batch: dict, keys: Array) -> tuple[Array, dict]:
        """See `contract.Objective`; the loss is the only metric."""
        pixels = preprocess.to_float(batch["image"])
        drawn, drop = self.draw(keys, self.latent_source.latents_shape)
        latents = self.latents(pixels, drawn.posterior, batch.get("moments"))
        with adapters.dropout(drop):
            value, _ = self.forward(pixels, latents, drawn)
        return value, {"loss": value}
