"""Prints how many instruction bundles the TPU compiler schedules for a tile of our Pallas kernels, without a TPU.

    python bench/kernels.py [--topology=v5e:2x2] [--size=4096,4096,5,64] [--block=1024,1024 ...]
    python bench/kernels.py --kernel=feed_forward [--size=4096,320] [--block=512,640 ...]

The HLO has no time for kernels, but the compiler's dump has their final schedule: a bundle is issued per cycle at
best, and the file with the use of each unit has one line per bundle. The bundles of one step of the kernel's grid are
counted, its beginning and its end included, so the number is somewhat too high for a kernel of many steps. Stalls on
HBM and on the matrix unit are not in it; docs/TPU.md, section 4, has the bound of the latter. The attention kernel is
compiled with its usual way alone, in which norms bound the scores (`kernels.BOUNDED_SCORE`).
"""

import argparse
import math
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

IMAGES = 8  # Per chip; the milliseconds are for so many.


def bundles(folder: Path) -> dict[str, int]:
    """Returns kernel -> bundles of its schedule, from a dump of the compiler."""
    found = {}
    for path in folder.glob("*ward_*final_hlo-static-per-bundle-utilization.txt"):
        name = path.name.split("-")[1].split(".")[0]
        found[name] = sum(1 for line in path.read_text().splitlines()[4:] if line.strip())
    return found


def attention(size: list[int], block: tuple[int, int]):
    """Returns the function of local arrays, the shapes of arrays by image and of weights, and the number of tiles."""
    from diva_jax.models import kernels

    n, m, heads, width = size

    def run(q, k, v):
        out, pull = jax.vjp(lambda *a: kernels.attend(*a, heads, None, block, False), q, k, v)
        return out, pull(out)

    by_image = [(heads * width, length) for length in (n, m, m)]
    return run, by_image, [], heads * math.ceil(n / block[0]) * math.ceil(m / block[1])


def feed_forward(size: list[int], block: tuple[int, int]):
    """As `attention`; the block is (tokens, hidden units)."""
    from diva_jax.models import kernels
    from diva_jax.models.platform import tile

    n, c = size
    kernels.TILES, kernels.MAX_PART = {c: (block[0], max(vmem for _, vmem in kernels.TILES.values()))}, block[1]

    def run(x, *weights):
        y, projection = kernels.feed_forward(x, weights, 1e-5, save=True)
        return y, kernels.feed_backward(x, projection, y, weights, 1e-5)

    return run, [(c, n)], [(c,), (c,), (c, 8 * c), (8 * c,), (4 * c, c), (c,)], n // tile(n, block[0])


KERNELS = {
    "attention": (attention, "4096,4096,5,64", "1024,1024"),
    "feed_forward": (feed_forward, "4096,320", "512,640"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=KERNELS, default="attention")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--size", help="queries, keys, heads, head dim; for feed_forward: tokens, channels")
    parser.add_argument("--block", nargs="+", help="queries and keys per tile; tokens and hidden units per part")
    args = parser.parse_args()
    make, size, block = KERNELS[args.kernel]
    with tempfile.TemporaryDirectory() as folder:
        # libtpu reads this when it is loaded.
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        jax.config.update("jax_platforms", "cpu")
        from diva_jax import aot, config as configs
        from diva_jax.costs import hlo
        from diva_jax.models import kernels
        from diva_jax.training import partition

        kernels.BOUNDED_SCORE = math.inf
        chip, _, devices = aot.devices(args.topology)
        mesh = partition.make_mesh(configs.default().mesh, devices)
        by_batch, replicated = NamedSharding(mesh, partition.BATCH), NamedSharding(mesh, P())
        for text in args.block or [block]:
            tile = tuple(int(part) for part in text.split(","))
            run, by_image, weights, tiles = make([int(part) for part in (args.size or size).split(",")], tile)
            shapes = [
                jax.ShapeDtypeStruct((IMAGES * mesh.size, *shape), jnp.bfloat16, sharding=by_batch)
                for shape in by_image
            ] + [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=replicated) for shape in weights]
            specs = (partition.BATCH,) * len(by_image) + (P(),) * len(weights)
            for path in Path(folder).iterdir():
                path.unlink()
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                both = jax.shard_map(run, in_specs=specs, out_specs=partition.BATCH, check_vma=False)
                compiled = jax.jit(both).lower(*shapes).compile()
            bounds = {
                op.name.rsplit(".", 1)[0]: 1e3 * hlo.kernel_seconds(op, computation, chip)
                for op, computation, _ in hlo.parse(compiled.as_text()).executed()
            }
            for name, count in sorted(bundles(Path(folder)).items()):
                ms = 1e3 * count * tiles * IMAGES / chip.clock
                print(
                    f"{args.topology} {args.size or size} tile {text} {name}: {count} bundles, {ms:.3f} ms for "
                    f"{tiles} tiles of {IMAGES} images; bound {bounds[name]:.3f} ms",
                    flush=True,
                )


if __name__ == "__main__":
    main()
