"""The base of objectives with a frozen Stable Diffusion model; sums over Monte Carlo draws with the memory of one."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diva_jax.common.errors import UserError
from diva_jax.data import preprocess
from diva_jax.models import backbones
from diva_jax.models.diffusion import schedule
from diva_jax.models.diffusion.presets import Diffusion
from diva_jax.models.diffusion.unet import UNet
from diva_jax.models.layers import Array
from diva_jax.objectives import contract
from diva_jax.weights import parts


def weighted_sum(fn: Callable, inputs, draws, weights: jax.Array):
    """sum_k weights[k] * fn(inputs, draws[k]), differentiable in `inputs` and in what `fn` closes over.

    Differentiating a plain scan keeps every draw's activations until the backward pass. Here each draw's
    gradient is taken right after its forward pass and only the sum is kept, so that N passes through a
    U-Net need the memory (and the compile time) of one, with no recomputation.

    `fn` is (inputs, one draw) -> (scalar, aux). Arrays that it closes over are differentiated where they depend on what
    is differentiated outside, so that any part of a model may be trained; gradients of others are not computed.
    `inputs` is a pytree of arrays, `draws` one with a leading axis [N, ...], `weights` are float [N]. Returns (scalar,
    aux stacked over draws [N, ...])."""
    fn, closed_over = jax.closure_convert(fn, inputs, jax.tree.map(lambda d: d[0], draws))
    leaves, structure = jax.tree.flatten((inputs, closed_over))

    def at(leaves, draw):
        inputs, closed_over = jax.tree.unflatten(structure, leaves)
        return fn(inputs, draw, *closed_over)

    def plain(leaves):
        values, aux = jax.lax.map(lambda draw: at(leaves, draw), draws)
        return jnp.vdot(weights, values), aux

    def forward(leaves):
        trained = {i: leaf.value for i, leaf in enumerate(leaves) if leaf.perturbed}

        def one(trained, draw):
            return at([trained.get(i, leaf.value) for i, leaf in enumerate(leaves)], draw)

        def body(grads, x):
            draw, weight = x
            (value, aux), g = jax.value_and_grad(one, has_aux=True)(trained, draw)
            return jax.tree.map(lambda a, b: a + (weight * b).astype(a.dtype), grads, g), (value, aux)

        zeros = jax.tree.map(jnp.zeros_like, trained)
        if len(weights) == 1:
            # One pass needs no loop.
            grads, seen = body(zeros, jax.tree.map(lambda x: x[0], (draws, weights)))
            values, aux = jax.tree.map(lambda x: x[None], seen)
        else:
            grads, (values, aux) = jax.lax.scan(body, zeros, (draws, weights))
        return (jnp.vdot(weights, values), aux), grads

    def backward(grads, cotangents):
        ct, _ = cotangents  # aux carries no gradient
        if isinstance(ct, jax.custom_derivatives.SymbolicZero):
            grads = {}
        return ([(ct * grads[i]).astype(grads[i].dtype) if i in grads else None for i in range(len(leaves))],)

    total = jax.custom_vjp(plain)
    total.defvjp(forward, backward, symbolic_zeros=True)
    return total(leaves)


def view_stats(spec: backbones.Spec, switch: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of the tower's input: the backbone's own where a switch is exact, OpenAI's where it is faithful."""
    return (spec.mean, spec.std) if switch == contract.EXACT else (backbones.OPENAI_MEAN, backbones.OPENAI_STD)


class StableDiffusionObjective(contract.Objective):
    """A vision tower that is tuned through a frozen U-Net, with a frozen VAE and the states of a prompt. It has the
    backbone's `spec`, `diffusion`, which is `config.diffusion` parsed, the side of the VAE's images `image_size`
    [pixels], the `dtype` of computations, `unet`, `vae` (None where latents are cached), and `text_context`, the last
    hidden states of P `prompts`, [P, T, C], if there are any: that of `config.diffusion`, unless a subclass has its
    own. `takes_class`: whether the U-Net is given a class embedding too."""

    takes_class: bool = False

    def __init__(self, config, image_size: int, view: str = contract.EXACT):
        """Parses the config. Towers follow in the order in which initial values are drawn: `contract.vision_tower`,
        what the objective has besides, `build_generator`."""
        self.spec, self.diffusion = backbones.spec_of(config), Diffusion.from_dict(config.diffusion.to_dict())
        self.image_size, self.dtype = image_size, jnp.dtype(config.dtype)
        self.prompts: Sequence[str] = (self.diffusion.prompt,)
        d, cached = self.diffusion, bool(config.data.latents)
        part = parts.diffusers(d.source, d.vae, "config.diffusion.vae")
        dtypes = config.dtype, config.frozen_dtype
        self.latent_source = contract.LatentSource(d.vae, part, image_size, *dtypes, view, cached)
        if d.unet.class_embed_dim is not None and not self.takes_class:
            problem = f"config.objective={config.objective} has no class embedding, which this U-Net needs"
            raise UserError(f"{problem}: use stable-diffusion-2-1-base, 2-1 or v1-5 as config.diffusion")

    def build_generator(self, config, rngs: nnx.Rngs) -> None:
        """Makes the U-Net, the VAE (unless latents are cached) and, with prompts, an empty `text_context`."""
        unet, kw = self.diffusion.unet, dict(rngs=rngs, dtype=self.dtype, param_dtype=jnp.dtype(config.frozen_dtype))
        self.unet = UNet(unet, remat=config.remat == "all", **kw)
        self.vae = None if config.data.latents else self.diffusion.vae.build(**kw)
        if self.prompts:
            context = (len(self.prompts), self.diffusion.text_tokens, unet.cross_attention_dim)
            self.text_context = nnx.Variable(jnp.zeros(context, jnp.float32))

    @property
    def timesteps(self) -> int:
        """Of the noise schedule: timesteps are 0 to this, exclusive."""
        return self.diffusion.scheduler.num_train_timesteps

    @property
    def timestep_range(self) -> tuple[int, int]:
        """The first timestep that is drawn, and the one after the last, where the options state them."""
        return self.options.first_timestep, self.options.end_timestep or self.timesteps

    def check_timesteps(self, section: str) -> None:
        """Raises a UserError where `timestep_range` is not within the schedule."""
        low, high = self.timestep_range
        if not 0 <= low < high <= self.timesteps:
            within = f"must be a range within the {self.timesteps} timesteps of config.diffusion.scheduler"
            raise UserError(f"config.{section}.first_timestep={low} and end_timestep={high} {within}")

    def pretrained(self, fresh: tuple[str, ...] = (), mask_padding: bool = False) -> Mapping[str, parts.Part]:
        """The vision tower, U-Net, VAE and text. `fresh` are the tower's parameters that its source does not have, see
        `parts.Part`; with `mask_padding` the prompt's tokens do not attend to padding."""
        d = self.diffusion
        context = parts.text_context(d.source, self.prompts, d.text_tokens, d.text_encoder, mask_padding)
        return {
            "vision": parts.vision(self.spec.source, self.spec, fresh=fresh),
            "unet": parts.diffusers(d.source, d.unet, "config.diffusion.unet", d.scheduler),
            **self.latent_source.pretrained,
            **({"text_context": context} if self.prompts else {}),
        }

    def latents(self, pixels: Array, moments: Array | None = None, noise: Array | None = None) -> Array:
        """The latents, [B, h, w, c], of pixels [B, S, S, 3] in [0, 1], or of given moments of the VAE's posterior, [B,
        h, w, 2 c]. With standard normal `noise`, [B, h, w, c], they are a sample of the posterior, without it its mean.
        """
        moments = self.moments(pixels) if moments is None else moments
        return self.diffusion.vae.latents(moments.astype(self.dtype), noise)

    def alphas_cumprod(self) -> Array | np.ndarray:
        """The products of 1 - beta, [T], float32."""
        return schedule.alphas_cumprod(self.diffusion.scheduler)

    def noisy(self, latents: Array, noise: Array, timesteps: Array) -> Array:
        """z_t of latents [B, h, w, c] at timesteps [B]."""
        return schedule.add_noise(latents, noise, self.alphas_cumprod(), timesteps)

    def target(self, latents: Array, noise: Array, timesteps: Array, kind: str = "") -> Array:
        """What the U-Net should predict, [B, h, w, c], as it was trained, or `kind`: "epsilon" or "v_prediction"."""
        kind = kind or self.diffusion.scheduler.prediction_type
        return schedule.target(latents, noise, self.alphas_cumprod(), timesteps, kind)

    def nats_per_loss(self, timesteps: Array, edges: np.ndarray, latents: Array, kind: str = "") -> Array:
        """The weight, [K, B], of a draw's gap between losses in the information that a condition gives, in nats; see
        `schedule.nats_per_error`. Timesteps are [K, B], one draw per bin; `edges` [K + 1] are the bins' first timesteps
        and the end; `kind`: see `target`."""
        weights = schedule.nats_per_error(self.diffusion.scheduler, latents[0].size, kind)
        return jnp.asarray(weights, jnp.float32)[timesteps] * jnp.diff(jnp.asarray(edges))[:, None]

    def run_unet(self, noisy: Array, timesteps: Array, context: Array, *labels: Array) -> Array:
        """What the U-Net predicts under a condition [B, n, C] and class labels, [B, h, w, c]."""
        with jax.named_scope("unet"):
            return self.unet(noisy, timesteps, context, *labels)

    def draw_for(self, batch: Mapping[str, Array], keys: Array):
        """(pixels [B, S, S, 3] in [0, 1], random numbers of the images) of a batch, from one key per image, [B]."""
        return preprocess.to_float(batch["image"]), self.draw(keys, self.latent_source.latents_shape)

    def loss(self, batch: Mapping[str, Array], keys: Array) -> tuple[Array, dict[str, Array]]:
        """See `contract.Objective`; the loss is the only metric."""
        value, _ = self.forward(*self.draw_for(batch, keys), batch.get("moments"))
        return value, {"loss": value}
