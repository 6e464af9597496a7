"""DCR (arXiv 2603.04803): a contrastive loss between a frozen U-Net's predictions under different images' conditions.

For images i of a group: noisy latents z_i at timestep t_i; the embedding e_i of the vision tower and e+_i of a jittered
view; conditions c = text + projector(e) on every row of the text; P[i, j] = UNet(z_i, t_i, c_j), P+[i] = UNet(z_i, t_i,
c+_i). With n(.) the flattened prediction divided by its norm and A_i = n(P[i, i]), the logits are products of A_i with
n(P+[i]) and n(target_i), the positives, and n(P[i, j]), j != i, the negatives, over a temperature. The loss of an image
is logsumexp(all logits) minus the mean of the two positives. The gradient reaches every condition.

Stage 1 trains the projector; stage 2 trains low-rank adapters of the tower. What is said of the method here is what
its authors' code (boyuh/DCR at c16d885) computes; each departure from it is a field of `DcrOptions`.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from diva_jax.common.errors import UserError
from diva_jax.common.fields import above, at_least, choice, field, parse
from diva_jax.data import preprocess
from diva_jax.models import adapters
from diva_jax.models.diffusion.flow import Projector, TorchLayers
from diva_jax.models.layers import Array, widened
from diva_jax.models.platform import split, tile
from diva_jax.objectives import contract
from diva_jax.objectives.contract import EXACT, FAITHFUL, switch
from diva_jax.objectives.shared.stable_diffusion import StableDiffusionObjective, view_stats, weighted_sum
from diva_jax.weights import parts

SECTIONS = ("condition", "diffusion")
TARGETS = {"epsilon": "epsilon", "velocity": "v_prediction", FAITHFUL: "v_prediction"}


@dataclasses.dataclass(frozen=True)
class DcrOptions:
    """`config.dcr`. "faithful" is what the authors' code does, "exact" what the models were trained on."""

    group: int = field(16, "So many images are compared with each other, in group^2 + group U-Net passes.", at_least(2))
    tile: int = field(17, "A chip holds so many U-Net passes at once; group + 1 avoids recomputation.", at_least(1))
    temperature: float = field(0.1, "The logits are divided by this temperature.", above(0))
    projector_only: bool = field(False, "Whether the run ends after stage 1 (condition.warmup_steps steps).")
    target: str = choice(
        (EXACT, FAITHFUL, "epsilon", "velocity"),
        "The target is what the U-Net predicts (exact), velocity for every U-Net (faithful), or the one that is named.",
    )
    plus_space: str = switch(
        "The positive view is a jitter of the image in [0, 1] (exact), or of the normalised one, clipped to [0, 1] "
        "(faithful)."
    )
    tower_norm: str = switch("The tower's input has the backbone's own mean and std (exact), or OpenAI's (faithful).")
    text_mask: str = switch("The prompt attends to padding, as Stable Diffusion's does (exact), or not (faithful).")
    schedule_dtype: str = switch("The products of 1 - beta are in float32 (exact), or in config.dtype (faithful).")
    loss_dtype: str = switch("Predictions, logits and loss are in float32 (exact), or in config.dtype (faithful).")
    stage1_loss: str = switch(
        "Stage 1 has the loss of stage 2 (faithful), or the squared error of what the U-Net predicts, as the paper is "
        "said to do, which could not be verified (exact).",
        FAITHFUL,
    )
    lora: adapters.Lora = adapters.Lora(rank=16, alpha=16.0, dropout=0.1, biases=True)


SECTION = DcrOptions


def recipe(config: ConfigDict) -> None:
    """The authors' recipe: 256 images per step, in groups of 16; the constant learning rate of each stage."""
    config.steps, config.batch_size = 4600, 256
    config.condition.update(warmup_steps=100_000, warmup_lr=1e-4)
    config.optim.update(name="adamw", lr=1e-5, weight_decay=0.01, decay_all=True, clip=1.0)
    config.optim.update(schedule="constant", warmup=0.0)
    config.diffusion.prompt = ""
    config.data.image_size = config.backbone.image_size
    config.dcr.lora.targets = adapters.TARGETS.get(config.backbone.arch, adapters.BLOCKS)
    # Beside the adapters, see `stages`.
    config.trainable = ((".*", 0.0),)


def stages(config: ConfigDict) -> tuple[contract.Stage, ...]:
    """The projector for condition.warmup_steps, then the adapters (and what `config.trainable` names) for steps."""
    lora, warm = parse(DcrOptions, config.dcr, "config.dcr").lora, config.condition.warmup_steps
    first = contract.Stage("projector", 0, warm, config.condition.warmup_lr, (("projector/.*", 1.0), (".*", 0.0)))
    if config.dcr.projector_only:
        return (first,)
    rows, head = lora.trainable("vision"), adapters.SIGLIP_HEAD
    # PyTorch never calls this layer's own forward, so its adapter has no effect, but its bias is trained.
    if lora.biases and config.backbone.arch == "siglip" and not re.fullmatch(lora.targets, head):
        rows += ((f"vision/{head}/bias", 1.0),)
    rest = contract.tune(config, warm)
    second = rest._replace(name="tower", trainable=rows + rest.trainable)
    return (first, second) if warm else (second,)


def validate(config: ConfigDict) -> None:
    """Raises a UserError where the batch cannot be divided into groups, or sizes or stages do not fit together."""
    options = parse(DcrOptions, config.dcr, "config.dcr")
    if options.stage1_loss == EXACT and not options.projector_only:
        alone = "stage 1 by itself with config.dcr.projector_only=True"
        rest = "stage 2 from its result with config.condition.warmup_steps=0"
        raise UserError(f"config.dcr.stage1_loss=exact is another loss than stage 2's: run {alone}, then {rest}")
    whole = options.group * config.accum
    if config.batch_size % whole:
        near = max(1, round(config.batch_size / whole)) * whole
        groups = f"groups of {options.group} images (config.dcr.group) x {config.accum} micro-batches"
        raise UserError(f"config.batch_size={config.batch_size} cannot be divided into {groups}: use {near}")
    if options.projector_only and not config.condition.warmup_steps:
        raise UserError("config.dcr.projector_only=True trains nothing with config.condition.warmup_steps=0: set steps")
    if config.data.image_size != config.backbone.image_size:
        problem = f"config.data.image_size={config.data.image_size} must be equal to config.backbone.image_size"
        raise UserError(f"{problem}={config.backbone.image_size}: the VAE and the vision tower of DCR see one view")


class DcrDraws(NamedTuple):
    """The random numbers of B images. Timesteps [B], int32, in 0..T-1; standard normal numbers of the latents' shape
    [B, h, w, c] for the diffusion and for the VAE's posterior; those of the positive view; and PRNG keys [B] of the
    adapters' dropout in the two passes of the tower, None: no dropout."""

    timesteps: Array
    noise: Array
    posterior: Array
    jitter: preprocess.Jitter
    dropout: tuple[Array, Array] | None


class Contrast(NamedTuple):
    """The contrastive loss of each image and its logits. `losses` [B, 2] are minus the logarithm of each positive's
    share, plus and target; the loss is the mean of all. `others` [B, g] are the logits of all conditions of the group,
    `plus` and `target` [B] those of the positives."""

    losses: Array
    others: Array
    plus: Array
    target: Array


def contrast(predicted: Array, goal: Array, anchors: Array, temperature: float) -> Contrast:
    """The contrastive loss of B images over a temperature. `predicted` [B, g + 1, h, w, c] is under the conditions of
    the group, then under the plus condition; `goal` is [B, h, w, c]; `anchors` [B] are indices in the group."""

    def unit(x):
        flat = x.reshape(*x.shape[:-3], -1)
        # The square root has no derivative at zero.
        square = jnp.sum(flat * flat, axis=-1, keepdims=True)
        return flat / jnp.maximum(jnp.sqrt(jnp.maximum(square, jnp.finfo(flat.dtype).tiny)), 1e-12)

    shares = unit(predicted)
    anchor = jnp.take_along_axis(shares, anchors[:, None, None], axis=1)  # [B, 1, n]
    logits = jnp.sum(anchor * shares, axis=-1) / temperature  # [B, g + 1]
    target = jnp.sum(anchor[:, 0] * unit(goal), axis=-1) / temperature
    others, plus = logits[:, :-1], logits[:, -1]
    every = jnp.concatenate([logits, target[:, None]], axis=1)
    z = jax.nn.logsumexp(every, axis=1, where=jnp.arange(every.shape[1]) != anchors[:, None])
    return Contrast(jnp.stack([z - plus, z - target], axis=1), others, plus, target)


class Objective(StableDiffusionObjective):
    """`projector` is trained in stage 1, the adapters in `vision` in stage 2."""

    compares_images = True

    def __init__(self, config, *, rngs):
        self.options = parse(DcrOptions, config.dcr, "config.dcr")
        super().__init__(config, config.backbone.image_size)
        self.vision = contract.vision_tower(config, self.spec, rngs)
        adapters.adapt(self.vision, self.options.lora, rngs)
        layers = TorchLayers(rngs, self.dtype, jnp.float32)
        self.projector = Projector(self.spec.embed_dim, self.diffusion.unet.cross_attention_dim, layers)
        self.build_generator(config, rngs)

    def pretrained(self) -> Mapping[str, parts.Part]:
        """See `contract.Objective`; the projector and the adapters have no source."""
        return super().pretrained((adapters.FRESH,), self.options.text_mask == FAITHFUL)

    def draw(self, keys: Array, latents_shape: tuple[int, int, int]) -> DcrDraws:
        """From one key per image, [B]; each image's draw depends on its key alone."""

        def one(key):
            t, noise, posterior, plus, first, second = jax.random.split(key, 6)
            normal = [jax.random.normal(k, latents_shape, jnp.float32) for k in (noise, posterior)]
            return jax.random.randint(t, (), 0, self.timesteps), *normal, plus, (first, second)

        timesteps, noise, posterior, plus, dropout = jax.vmap(one)(keys)
        return DcrDraws(timesteps, noise, posterior, preprocess.draw_jitter(plus, self.spec.image_size), dropout)

    def views(self, pixels: Array, drawn: preprocess.Jitter) -> tuple[Array, Array]:
        """Pixels [B, S, S, 3] in [0, 1] -> (the tower's view, the jittered one)."""
        stats = view_stats(self.spec, self.options.tower_norm)
        view = preprocess.normalise(pixels, *stats)
        if self.options.plus_space == FAITHFUL:
            return view, preprocess.jittered(view, drawn)
        return view, preprocess.normalise(preprocess.jittered(pixels, drawn), *stats)

    def alphas_cumprod(self) -> Array:
        """As the base class's, rounded as `schedule_dtype` says."""
        abar = jnp.asarray(super().alphas_cumprod())
        return abar.astype(self.dtype).astype(abar.dtype) if self.options.schedule_dtype == FAITHFUL else abar

    def tiles(self, images: int) -> tuple[int, int]:
        """(chunks of the micro-batch, conditions of the group + 1) that run at the same time. A chunk of r images per
        chip under k conditions has at most `tile` passes; where all conditions fit, an image's gradient is taken right
        after its passes; otherwise, its passes are computed again in the backward pass."""
        conditions = 1 if self.options.stage1_loss == EXACT else self.options.group + 1
        mesh = jax.sharding.get_abstract_mesh()
        chips = 1 if mesh.empty else mesh.size
        local = images // chips if images % chips == 0 else images
        if self.options.tile >= conditions:
            return local // tile(local, self.options.tile // conditions, 1), conditions
        together = tile(local, self.options.tile, 1)
        return local // together, tile(conditions, self.options.tile // together, 1)

    def predict(self, noisy: Array, timesteps: Array, conditions: Array, together: int) -> Array:
        """Predictions, [B, n, h, w, c], of `noisy`, [B, h, w, c], under conditions [B, n, C] added to the text's rows.
        `together` of the n, a divisor, run at the same time; fewer than n are computed again in the backward pass."""
        b, n, _ = conditions.shape

        def some(p):
            """[B, k, C] -> [B, k, h, w, c]."""
            each = [jnp.repeat(x, p.shape[1], axis=0) for x in (noisy, timesteps)]
            out = self.run_unet(*each, p.reshape(-1, 1, p.shape[-1]) + self.text_context[...].astype(p.dtype))
            return out.reshape(b, p.shape[1], *out.shape[1:])

        if together == n:
            out = some(conditions)
        else:
            tiles = jnp.moveaxis(conditions.reshape(b, n // together, together, -1), 1, 0)
            out = jax.lax.map(jax.checkpoint(some), tiles)  # [n / together, B, together, h, w, c]
            out = jnp.moveaxis(out, 0, 1).reshape(b, n, *out.shape[3:])
        return out.astype(self.dtype) if self.options.loss_dtype == FAITHFUL else widened(out)

    def forward(self, pixels: Array, drawn: DcrDraws, moments: Array | None = None) -> tuple[Array, dict]:
        """The loss of pixels [B, S, S, 3] in [0, 1], of which k * group to (k + 1) * group - 1 are compared, and
        everything on the way. `moments` of the VAE's posterior, [B, h, w, 2 c], are computed where they are not given.
        Returns (loss, {latents, noisy, goal [B, h, w, c]; embedding, plus_embedding [B, d]; context, context_plus [B,
        C]; predicted [B, g + 1, h, w, c]; contrast}); with the loss of reconstruction `contrast` and all of `predicted`
        but the own condition's are missing."""
        g, b = self.options.group, pixels.shape[0]
        latents = self.latents(pixels, moments, drawn.posterior)
        noisy = self.noisy(latents, drawn.noise, drawn.timesteps)
        embeddings = []
        for view, keys in zip(self.views(pixels, drawn.jitter), drawn.dropout or (None, None), strict=True):
            with adapters.dropout(keys):
                embeddings.append(self.encode(view).pooled)
        p, plus = (self.projector(e) for e in embeddings)
        seen = dict(latents=latents, noisy=noisy, embedding=embeddings[0], plus_embedding=embeddings[1])
        seen |= dict(context=p, context_plus=plus)
        reconstruct = self.options.stage1_loss == EXACT
        named = "" if reconstruct else TARGETS.get(self.options.target, "")
        goal = self.target(latents, drawn.noise, drawn.timesteps, named)
        chunks, together = self.tiles(b)

        def one_chunk(given, chunk):
            (p, plus), (rows, noisy, t, goal) = given, chunk
            if reconstruct:
                predicted = self.predict(noisy, t, p[rows][:, None], 1)
                loss = jnp.mean(jnp.square(predicted[:, 0] - goal.astype(predicted.dtype)))
                return loss.astype(jnp.float32), {"predicted": predicted}
            conditions = p.reshape(b // g, g, -1)[rows // g]  # [rows, g, C]
            predicted = self.predict(noisy, t, jnp.concatenate([conditions, plus[rows][:, None]], axis=1), together)
            compared = contrast(predicted, goal.astype(predicted.dtype), rows % g, self.options.temperature)
            return jnp.mean(compared.losses).astype(jnp.float32), {"predicted": predicted, "contrast": compared}

        parts_of = jax.tree.map(lambda x: split(x, chunks), (jnp.arange(b), noisy, drawn.timesteps, goal))
        value, by_chunk = weighted_sum(one_chunk, (p, plus), parts_of, jnp.full((chunks,), 1 / chunks, jnp.float32))
        joined = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(b, *x.shape[2:]), by_chunk)
        return value, {**seen, "goal": goal, **joined}
