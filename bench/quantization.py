"""Compares the gradient through int8 products of a frozen U-Net with that in float32: python bench/quantization.py

The number is the cosine between the gradient and the float32 one of the same draw. Beside it is the cosine between the
float32 gradients of two independent draws of timesteps and noise, which is how far the gradient of one step is from
that of the next in any case. Runs on a CPU.

  world        the small world's generator with its kept weights, objective diva as in the arm `stages`, gradient to
               the parameters of the vision tower
  unet         Stable Diffusion's U-Net with random weights and latents of --side, gradient to the condition
  transformer  one of its transformers for each width, random weights, gradient to tokens and condition; no draws
"""

import argparse
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from diva_jax.data import pipeline
from diva_jax.models.diffusion import schedule
from diva_jax.models.diffusion.blocks import Transformer
from diva_jax.models.diffusion.unet import PRODUCTS, UNet, UNetConfig
from diva_jax.models.layers import Keys, abstract
from diva_jax.models.quantized import INT8, QuantizableLayers, quantize
from diva_jax.train import to_device
from diva_jax.training import load, partition, sharding, step
from diva_jax.world import arms

C = UNetConfig()
TOKENS = 77
# Name -> (dtype of activations and weights, `config.frozen_quantization`).
FORMS = {
    "bfloat16": ("bfloat16", ""),
    "int8 in float32": ("float32", INT8),
    "int8 in bfloat16": ("bfloat16", INT8),
}


def cosine(a, b) -> float:
    """Cosine of two trees of arrays, as one vector each."""
    a, b = (np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(t)]) for t in (a, b))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def world(args) -> Callable:
    config = arms.arm_config(arms.ARMS["stages"], args.seed, 3, args.images, "")
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])

    def gradient(dtype: str, quantization: str, draw: int):
        c = config.copy_and_resolve_references()
        c.update(dtype=dtype, frozen_dtype=dtype, frozen_quantization=quantization)
        p = step.Program(c, mesh)
        arrays, _ = load.initial_arrays(p, every_source=False)
        batches = pipeline.open_batches(c.data, p.objective.inputs, seed=args.seed, global_batch=c.batch_size)
        batch = to_device(next(batches), p.batch_sharding)
        batches.close()
        trained = {n: a for n, a in arrays.items() if n.startswith("vision/")}
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(draw), batch["row"])

        @jax.jit
        def grad(trained, rest, batch, keys):
            rest = p.quantized(rest)
            return jax.grad(lambda t: p.skeleton.merge(t, rest).loss(batch, keys)[0])(trained)

        return grad(trained, {n: a for n, a in arrays.items() if n not in trained}, batch, keys)

    return gradient


def narrowed(skeleton: partition.Skeleton, arrays: Mapping, dtype: str, quantization: str, place: str = ""):
    """A module of these weights, in one of the forms; `place` is the path to it in a U-Net."""
    arrays = {n: a.astype(dtype) for n, a in arrays.items()}
    if quantization:
        arrays |= {n: quantize(a) for n, a in arrays.items() if re.fullmatch(PRODUCTS, place + n)}
    return skeleton.merge(arrays)


def skeleton_of(make: Callable, dtype: str) -> partition.Skeleton:
    return partition.disassemble(abstract(lambda rngs: make(rngs, jnp.dtype(dtype))))[0]


def unet(args) -> Callable:
    def make(rngs, dtype):
        return UNet(C, rngs=rngs, dtype=dtype)

    arrays = jax.jit(lambda: partition.disassemble(make(Keys(args.seed), jnp.float32))[1])()
    sample, context = (
        jax.random.normal(jax.random.key(i), (args.images, *shape))
        for i, shape in enumerate([(args.side, args.side, 4), (TOKENS, C.cross_attention_dim)])
    )

    def gradient(dtype: str, quantization: str, draw: int):
        skeleton, key = skeleton_of(make, dtype), jax.random.fold_in(jax.random.key(args.seed + 1), draw)
        t = jax.random.randint(key, (args.images,), 0, 1000)
        noise = jax.random.normal(key, sample.shape)
        abar = schedule.alphas_cumprod(schedule.ScheduleConfig())

        @jax.jit
        def grad(arrays, context, t, noise):
            model = narrowed(skeleton, arrays, dtype, quantization)
            noisy = schedule.add_noise(sample, noise, abar, t)
            return jax.grad(lambda c: jnp.mean(jnp.square(model(noisy, t, c).astype(jnp.float32) - noise)))(context)

        return grad(arrays, context, t, noise)

    return gradient


def transformer(args, width: int) -> Callable:
    def make(rngs, dtype):
        layers = QuantizableLayers(rngs, dtype, jnp.float32)
        return Transformer(width, C.cross_attention_dim, width // 64, C.norm_num_groups, True, layers)

    arrays = jax.jit(lambda: partition.disassemble(make(Keys(args.seed), jnp.float32))[1])()
    shapes = [(args.side, args.side, width), (TOKENS, C.cross_attention_dim), (args.side, args.side, width)]
    x, context, weights = (
        jax.random.normal(jax.random.key(i), (args.images, *shape)) for i, shape in enumerate(shapes)
    )

    def gradient(dtype: str, quantization: str, draw: int):
        skeleton = skeleton_of(make, dtype)

        @jax.jit
        def grad(arrays, *given):
            model = narrowed(skeleton, arrays, dtype, quantization, "attentions/0/")
            return jax.grad(lambda g: jnp.sum(weights * model(*(x.astype(dtype) for x in g))))(given)

        return grad(arrays, x, context)

    return gradient


def report(what: str, gradient: Callable, draws: bool = True) -> None:
    reference = gradient("float32", "", 0)
    row = [f"{name} {cosine(reference, gradient(*form, 0)):.6f}" for name, form in FORMS.items()]
    if draws:
        row.append(f"another draw in float32 {cosine(reference, gradient('float32', '', 1)):.6f}")
    print(f"{what}: cosine with the float32 gradient: " + ", ".join(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("world", "unet", "transformer"), default="world")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--side", type=int, default=8, help="of the latents or the feature map [pixels]")
    parser.add_argument("--width", type=int, nargs="+", default=[320, 640, 1280], help="of --part=transformer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.part == "transformer":
        for width in args.width:
            report(f"transformer {width}, {args.side}x{args.side}", transformer(args, width), draws=False)
    else:
        report(f"{args.part}, {args.images} images", {"world": world, "unet": unet}[args.part](args))


if __name__ == "__main__":
    main()
