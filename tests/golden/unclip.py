"""Golden files of un²CLIP: every option of the noise on the embedding, under both targets, over tiny random modules.

The numbers are diffusers' (Stable unCLIP's pipeline) and open_clip's. The U-Net and VAE are those of sd_tiny_7.npz, to
which a file adds the U-Net's class embedding.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
from flax import nnx
from helpers import filled
from reading import diffusion_config, fill_generator, gradients, take, tower_spec

from diva_jax import config
from diva_jax.models.diffusion import schedule
from diva_jax.models.layers import abstract
from diva_jax.objectives import unclip
from diva_jax.training import partition
from diva_jax.weights import names

PREFIX = "unclip"
HEADS = 4
# Not results: what a file feeds.
GIVEN = ("pixels", "clip_pixels", "text_context", "timesteps", "noise", "embed_noise", "levels", "keep", "posterior")
GIVEN += ("stats_mean", "stats_std", "meta")


def objective(z, sd) -> unclip.Objective:
    meta, diffusion = json.loads(str(z["meta"])), diffusion_config()
    fields = dict(image_size=z["clip_pixels"].shape[1], heads=HEADS)
    fields |= dict(activation="quick_gelu" if meta["act"] == "quick_gelu" else "gelu")
    spec = tower_spec(take(z, "w/"), "vit", **fields)
    width = z["w/unet.class_embedding.linear_1.weight"].shape[1]
    diffusion["unet"] |= dict(class_embed_type="projection", projection_class_embeddings_input_dim=width)
    diffusion["scheduler"] |= dict(prediction_type="v_prediction")
    c = config.default(spec, diffusion, "unclip")
    c.update(dtype="float32", frozen_dtype="float32")
    c.unclip.update(latents=meta["latents"], embed_noise="random")  # So that it has statistics.
    module = abstract(lambda rngs: unclip.Objective(c, rngs=rngs))
    module.vision = filled(module.vision, take(z, "w/visual.", "visual."), names.table("vision", spec))
    fill_generator(module, sd, z["text_context"], take(z, "w/unet."))
    for name in ("mean", "std"):
        setattr(module.image_normalizer, name, nnx.Variable(jnp.asarray(z[f"stats_{name}"])))
    return module


def compare(path, z, sd):
    """A case is named after its options: `random_drop+stats` is random levels, labels dropped, with statistics."""
    module = objective(z, sd)
    given, (skeleton, arrays) = module.options, partition.disassemble(module)
    cases = sorted({k.split("/")[0] for k in z.files if k.endswith("/class_labels")})
    whole = sorted({k.split("/grad/")[0] for k in z.files if "/grad/" in k})
    pixels, clip_pixels = (jnp.asarray(z[k]) for k in ("pixels", "clip_pixels"))
    drawn = unclip.UnclipDraws(**{f: jnp.asarray(z[f]) for f in unclip.UnclipDraws._fields})
    trained = {k: v for k, v in arrays.items() if k.startswith("vision/")}
    abar = schedule.alphas_cumprod(module.diffusion.scheduler)

    def as_if(trained=trained, **options):
        made = skeleton.merge(arrays, trained)
        made.options = dataclasses.replace(given, **options)
        return made

    @jax.jit
    def denoised(labels):
        """(prediction, by target the loss and its gradient with respect to the labels)."""
        pred, pull = jax.vjp(lambda c: as_if().denoise(latents, drawn, c), labels)
        losses = {t: lambda p, t=t: jnp.mean(as_if(target=t).errors(p, latents, drawn)) for t in ("v", "eps")}
        found = {t: jax.value_and_grad(loss)(pred) for t, loss in losses.items()}
        slopes = jax.lax.map(lambda g: pull(g)[0], jnp.stack([g for _, g in found.values()]))  # Compiled once.
        return pred, {t: (loss, slope) for (t, (loss, _)), slope in zip(found.items(), slopes, strict=True)}

    moments = jax.jit(lambda x: as_if().vae.moments(2 * x - 1))(pixels)
    mean, logvar = jnp.split(moments, 2, axis=-1)
    latents = as_if().encode_latents(None, drawn, moments)
    embed, to_trained = jax.vjp(jax.jit(lambda p: as_if(p).embed(clip_pixels)), trained)
    out = dict(latent_mean=mean, latent_std=jnp.exp(0.5 * logvar), latents=latents, embed=embed)
    out["z_t"] = schedule.add_noise(latents, drawn.noise, abar, drawn.timesteps)
    out["target_v"] = schedule.target(latents, drawn.noise, abar, drawn.timesteps, "v_prediction")
    for case in cases:
        noise, _, stats = case.partition("+")
        made = as_if(embed_noise=noise.removesuffix("_drop"), stats="on" if stats else "off")
        draws = drawn if "_drop" in case else drawn._replace(keep=jnp.ones_like(drawn.keep))
        labels, to_embed = jax.vjp(lambda e, made=made, draws=draws: made.class_labels(e, draws), embed)
        out[f"{case}/class_labels"], (out[f"{case}/pred"], found) = labels, denoised(labels)
        for target, (loss, g) in found.items():
            name, (of_embed,) = f"{case}/{target}", to_embed(g)
            out |= {f"{name}/loss": loss, f"{name}/grad_embed": of_embed}
            if name in whole:
                vision = names.table("vision", module.spec)
                tensors = gradients(skeleton, to_trained(of_embed)[0], "vision", vision)
                out |= {f"{name}/grad/{k}": v for k, v in tensors.items()}
    out |= dict(alphas_cumprod=abar, embed_alphas_cumprod=schedule.alphas_cumprod(unclip.LEVELS))
    return {k: z[k] for k in z.files if k not in GIVEN and not k.startswith("w/")}, out, {}
