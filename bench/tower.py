"""Compiles the gradient of three blocks of a tower for a TPU, the batch at once and in parts; prints the costs of both.

    python bench/tower.py [--topology=v5e:2x2] [--images=64] [--parts=8] [--tokens=257] [--width=1024] [--kernels=own]

The gradient is that of the weights, held in float32, and of the input, in bfloat16; blocks are computed again in the
backward pass, as with config.remat=vision. Heads have 64 channels. The slice is not needed, only libtpu
(see diva_jax/aot.py). A line per program: milliseconds per block that the compiler estimates for operations, plus the
kernels' time at the bound of their shapes.
"""

import argparse
from unittest import mock

import jax
import jax.numpy as jnp
import unet
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

from diva_jax import aot, config as configs
from diva_jax.costs import chips, hlo
from diva_jax.models import platform
from diva_jax.models.backbones.shared import transformer
from diva_jax.models.layers import Layers, abstract
from diva_jax.training import compiler, partition

BLOCKS = 3


def compiled(args, chip: chips.Chip, mesh) -> jax.stages.Compiled:
    def make(rngs):
        layers, heads = Layers(rngs, jnp.bfloat16, jnp.float32), args.width // 64
        return transformer.blocks(
            layers, BLOCKS, args.width, heads, 4 * args.width, "quick_gelu", 1e-5, causal=args.causal
        )

    graph, state = nnx.split(abstract(make))
    replicated, by_batch = NamedSharding(mesh, P()), NamedSharding(mesh, partition.BATCH)
    state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated), state)
    x = jax.ShapeDtypeStruct((args.images * mesh.size, args.tokens, args.width), jnp.bfloat16, sharding=by_batch)

    def loss(state, x):
        out = transformer.run(nnx.merge(graph, state), x, remat=True)
        return jnp.mean(jnp.square(out.astype(jnp.float32)))

    def gradient(state, x):
        with platform.traced_on(mesh.abstract_mesh, compiler.chosen_kernels(args.kernels, mesh.abstract_mesh)):
            return jax.value_and_grad(loss, argnums=(0, 1))(state, x)

    return jax.jit(gradient).lower(state, x).compile(compiler_options=dict(chip.compiler_options))


def line(name: str, program: jax.stages.Compiled, chip: chips.Chip) -> str:
    cost = hlo.analyse(program.as_text(), chip)
    return (
        f"{name}: {cost['model_ms'] / BLOCKS:.2f} + {cost['kernel_bound_ms'] / BLOCKS:.2f} kernels ms per block, "
        f"temporaries {program.memory_analysis().temp_size_in_bytes / 2**30:.2f} GiB; " + unet.kinds(cost, BLOCKS)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--images", type=int, default=64, help="per device")
    parser.add_argument("--tokens", type=int, default=257, help="per image")
    parser.add_argument("--width", type=int, default=1024, help="[channels]")
    parser.add_argument("--parts", type=int, default=8, help="of the batch of a device")
    parser.add_argument("--causal", action="store_true", help="as a text tower")
    parser.add_argument("--kernels", choices=("own", "xla"), default="own", help="as config.kernels")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # This process only compiles.
    chip, _, found = aot.devices(args.topology)
    mesh = partition.make_mesh(configs.default().mesh, found)
    for count in (1, args.parts):
        with mock.patch.object(transformer, "parts", lambda *shape, count=count: count):
            try:
                print(line(f"{count} parts", compiled(args, chip, mesh), chip), flush=True)
            except jax.errors.JaxRuntimeError as e:
                print(f"{count} parts: {str(e).splitlines()[0]}", flush=True)


if __name__ == "__main__":
    main()
