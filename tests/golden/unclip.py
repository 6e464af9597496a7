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
TARGETS = ("v", "eps")
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


def _options(given: unclip.UnclipOptions, key: str) -> unclip.UnclipOptions:
    """The options of a case: `random_drop+stats` is random levels, labels dropped, with statistics."""
    noise, _, stats = key.partition("+")
    return dataclasses.replace(given, embed_noise=noise.removesuffix("_drop"), stats="on" if stats else "off")


def compare(path, z, sd):
    """One program for all cases."""
    module = objective(z, sd)
    given = module.options
    cases = sorted({k.split("/")[0] for k in z.files if k.endswith("/class_labels")})
    whole = sorted({k.split("/grad/")[0] for k in z.files if "/grad/" in k})
    drawn = unclip.UnclipDraws(**{f: jnp.asarray(z[f]) for f in unclip.UnclipDraws._fields})
    everything = drawn._replace(keep=jnp.ones_like(drawn.keep))
    skeleton, arrays = partition.disassemble(module)
    trained = {k: v for k, v in arrays.items() if k.startswith("vision/")}
    abar = schedule.alphas_cumprod(module.diffusion.scheduler)

    def run(arrays, trained):
        def as_if(options=given, trained=trained):
            made = skeleton.merge(arrays, trained)
            made.options = options
            return made

        def labels_of(embed):
            made = [(as_if(_options(given, case)), drawn if "_drop" in case else everything) for case in cases]
            return jnp.stack([m.class_labels(embed, d) for m, d in made])

        moments = as_if().vae.moments(2 * jnp.asarray(z["pixels"]) - 1)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        latents = as_if().encode_latents(None, drawn, moments)
        embed, to_trained = jax.vjp(lambda p: as_if(trained=p).embed(jnp.asarray(z["clip_pixels"])), trained)
        labels, to_embed = jax.vjp(labels_of, embed)

        def one(labels):
            """(prediction, by target the loss and its gradient with respect to the labels)."""
            pred, pull = jax.vjp(lambda c: as_if().denoise(latents, drawn, c), labels)
            made = [as_if(dataclasses.replace(given, target=target)) for target in TARGETS]
            found = [jax.value_and_grad(lambda p, m=m: jnp.mean(m.errors(p, latents, drawn)))(pred) for m in made]
            (grads,) = jax.vmap(pull)(jnp.stack([g for _, g in found]))
            return pred, {t: (loss, g) for t, (loss, _), g in zip(TARGETS, found, grads, strict=True)}

        preds, found = jax.lax.map(one, labels)
        out = dict(latent_mean=mean, latent_std=jnp.exp(0.5 * logvar), latents=latents, embed=embed)
        out["z_t"] = schedule.add_noise(latents, drawn.noise, abar, drawn.timesteps)
        out["target_v"] = schedule.target(latents, drawn.noise, abar, drawn.timesteps, "v_prediction")
        for i, case in enumerate(cases):
            out |= {f"{case}/class_labels": labels[i], f"{case}/pred": preds[i]}
            for target, (loss, g) in found.items():
                (of_embed,) = to_embed(jnp.zeros_like(labels).at[i].set(g[i]))
                name = f"{case}/{target}"
                out |= {f"{name}/loss": loss[i], f"{name}/grad_embed": of_embed}
                if name in whole:
                    out[f"{name}/grad"] = to_trained(of_embed)[0]
        return out

    out = jax.jit(run)(arrays, trained)
    for name in whole:
        tensors = gradients(skeleton, out.pop(f"{name}/grad"), "vision", names.table("vision", module.spec))
        out |= {f"{name}/grad/{k}": v for k, v in tensors.items()}
    out |= dict(alphas_cumprod=abar, embed_alphas_cumprod=schedule.alphas_cumprod(unclip.LEVELS))
    return {k: z[k] for k in z.files if k not in GIVEN and not k.startswith("w/")}, out, {}
