"""Compiles the gradient of Stable Diffusion's U-Net, or of one block of it or of ViT-H/14, for a TPU; prints its costs.

    python bench/unet.py [--part=unet] [--topology=v5e:4x4] [--images=8] [--options=NAME=VALUE,...] [--json=FILE]

Levers are measured on this part of the train step because it compiles in minutes, and a block in seconds. The gradient
is that of the mean squared prediction with respect to the condition; of a block, with respect to its inputs. Weights
are frozen and in bfloat16. The slice is not needed, only libtpu (see diva_jax/aot.py). The output is one line per run:
milliseconds that the compiler estimates for operations, and the kernels' time at the bound of their shapes.
"""

import argparse
import collections
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

from diva_jax import aot, config as configs
from diva_jax.costs import chips, hlo
from diva_jax.models import platform
from diva_jax.models.backbones.shared.transformer import Block
from diva_jax.models.diffusion.blocks import ResnetBlock, Transformer
from diva_jax.models.diffusion.unet import UNet, UNetConfig
from diva_jax.models.layers import Layers, abstract
from diva_jax.training import compiler, partition

TOKENS = 77
C = UNetConfig()
BF16 = jnp.bfloat16


def whole(rngs, args):
    return UNet(C, rngs=rngs, dtype=BF16, param_dtype=BF16)


def transformer(rngs, args):
    layers = Layers(rngs, BF16, BF16)
    return Transformer(args.width, C.cross_attention_dim, args.width // 64, C.norm_num_groups, True, layers)


def resnet(rngs, args):
    return ResnetBlock(
        args.skip + args.width, args.width, C.norm_num_groups, C.norm_eps, Layers(rngs, BF16, BF16), 1280
    )


def tower(rngs, args):
    return Block(Layers(rngs, BF16, BF16), args.width, 16, 4 * args.width, "gelu", 1e-5)


# Part -> its module, and the inputs' (shape, dtype) for `n` images; the gradient is that of the inputs in floats that
# come before the first one that is not differentiated, None.
PARTS = {
    "unet": (whole, lambda n, a: (((n, TOKENS, 1024), BF16), None, ((n, 64, 64, 4), jnp.float32), ((n,), jnp.int32))),
    "transformer": (transformer, lambda n, a: (((n, a.side, a.side, a.width), BF16), ((n, TOKENS, 1024), BF16))),
    "tower": (tower, lambda n, a: (((n, 257, a.width), BF16),)),
    "resnet": (resnet, lambda n, a: (((n, a.side, a.side, a.skip + a.width), BF16), ((n, 1280), BF16))),
}


def lowered(args):
    """Returns the chip, the lowered program, and its FLOPs per device."""
    chip, _, found = aot.devices(args.topology)
    mesh = partition.make_mesh(configs.default().mesh, found)
    by_batch, replicated = NamedSharding(mesh, partition.BATCH), NamedSharding(mesh, P())
    make, shapes = PARTS[args.part]
    inputs = shapes(args.images * len(found), args)
    count = inputs.index(None) if None in inputs else len(inputs)
    inputs = [jax.ShapeDtypeStruct(*i, sharding=by_batch) for i in inputs if i]
    graph, state = nnx.split(abstract(lambda rngs: make(rngs, args)))
    state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated), state)

    def gradient(state, *inputs):
        def loss(*given):
            given = (*given, *inputs[count:])
            out = nnx.merge(graph, state)(*(given[1:] + given[:1] if args.part == "unet" else given))
            return jnp.mean(jnp.square(out.astype(jnp.float32)))

        with jax.named_scope("unet"):
            return jax.value_and_grad(loss, argnums=tuple(range(count)))(*inputs[:count])

    def run(state, *inputs):
        with platform.traced_on(mesh.abstract_mesh, compiler.chosen_kernels(args.kernels, mesh.abstract_mesh)):
            return gradient(state, *inputs)

    counted = chips.flops_by_part(jax.make_jaxpr(gradient)(state, *inputs).jaxpr).total() / len(found)
    return chip, jax.jit(run).lower(state, *inputs), counted


def measure(args) -> dict:
    chip, program, counted = lowered(args)
    began = time.perf_counter()
    compiled = program.compile(compiler_options=dict(o.split("=") for o in args.options.split(",") if o))
    seconds = time.perf_counter() - began
    text = compiled.as_text()
    if args.save:
        args.save.write_text(text)
    cost = hlo.analyse(text, chip)
    row = {
        "part": args.part, "topology": args.topology, "images": args.images, "options": args.options,
        "side": args.side, "width": args.width, "jax": jax.__version__, "kernels_of_config": args.kernels,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes, "seconds": seconds,
    }  # fmt: skip
    if args.part == "unet":
        ms = cost["model_ms"] + cost["kernel_bound_ms"]
        row |= {
            "ms_per_image": ms / args.images,
            "mfu": counted / (ms / 1e3 * chip.flops),
        }
    return row | cost


def kinds(cost: dict, blocks: int = 1) -> str:
    """Milliseconds per block of each kind of operation, in all parts of an `hlo.analyse`, the largest first."""
    found = collections.Counter()
    for part in cost["parts"].values():
        found.update(part["kinds"])
    return " ".join(f"{kind} {ms / blocks:.2f}" for kind, ms in found.most_common())


def line(row: dict) -> str:
    found = (
        f"{row['part']} {row['topology']} x{row['images']} [{row['options']}]: {row['model_ms']:.2f} + "
        f"{row['kernel_bound_ms']:.2f} kernels ms ({row['kernel_ms']:.2f} at peak), {row['hbm_gb']:.2f} GB, "
        f"temporaries {row['temporaries'] / 2**30:.2f} GiB, compiled in {row['seconds']:.0f} s; " + kinds(row)
    )
    return found + (f"; {row['ms_per_image']:.2f} ms per image, MFU {row['mfu']:.1%}" if "mfu" in row else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, default="unet")
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--images", type=int, default=8, help="per chip")
    parser.add_argument("--side", type=int, default=64, help="of a block's feature map [pixels]")
    parser.add_argument("--width", type=int, default=320, help="of a block [channels]")
    parser.add_argument("--skip", type=int, default=0, help="further channels of the input of --part=resnet")
    parser.add_argument("--options", default="", help="compiler options, NAME=VALUE,...")
    parser.add_argument("--kernels", choices=("own", "xla"), default="own", help="as config.kernels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the report to this file, one line each")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the optimised HLO to this file")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # This process only compiles.
    row = measure(args)
    print(line(row), flush=True)
    if args.json:
        with args.json.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
