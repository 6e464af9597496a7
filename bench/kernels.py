"""Prints how many instruction bundles the TPU compiler schedules for a tile of the attention kernels, without a TPU.

    python bench/kernels.py [--topology=v5e:2x2] [--size=4096,4096,5,64] [--block=1024,1024 ...]

The HLO has no time for kernels, but the compiler's dump has their final schedule: a bundle is issued per cycle at
best, and the file with the use of each unit has one line per bundle. The bundles of one step of the kernel's grid are
counted, its beginning and its end included, so the number is somewhat too high for a kernel of many steps. Stalls on
HBM are not in it.
"""

import argparse
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def bundles(folder: Path) -> dict[str, int]:
    """Returns kernel -> bundles of its schedule, from a dump of the compiler."""
    found = {}
    for path in folder.glob("*flash_*final_hlo-static-per-bundle-utilization.txt"):
        name = path.name.split("-")[1].split(".")[0]
        found[name] = sum(1 for line in path.read_text().splitlines()[4:] if line.strip())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--size", default="4096,4096,5,64", help="queries, keys, heads, head dim")
    parser.add_argument("--block", nargs="+", default=["1024,1024"], help="queries and keys per tile")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # libtpu reads this when it is loaded.
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        jax.config.update("jax_platforms", "cpu")
        from diva_jax import aot
        from diva_jax import config as configs
        from diva_jax.models import flash
        from diva_jax.training import sharding

        n, m, heads, width = (int(part) for part in args.size.split(","))
        mesh = sharding.make_mesh(configs.default().mesh, aot.devices(args.topology)[2])
        batch = 2 * mesh.size
        by_batch = NamedSharding(mesh, sharding.BATCH)
        q, k = (
            jax.ShapeDtypeStruct((batch, heads * width, length), jnp.bfloat16, sharding=by_batch) for length in (n, m)
        )
        for text in args.block:
            block = tuple(int(part) for part in text.split(","))

            def loss(q, k, v, block=block):
                def local(q, k, v):
                    return flash.attend(q, k, v, heads, None, block, False)

                with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                    out = jax.shard_map(
                        local, in_specs=(sharding.BATCH,) * 3, out_specs=P(("data", "fsdp")), check_vma=False
                    )
                    return jnp.sum(out(q, k, v).astype(jnp.float32) ** 2)

            for path in Path(folder).iterdir():
                path.unlink()
            jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k).compile()
            for name, count in sorted(bundles(Path(folder)).items()):
                scaled = count * 2**20 / (block[0] * block[1])
                print(
                    f"{args.topology} {args.size} tile {text} {name}: {count} bundles, {scaled:.0f} per 2^20 scores",
                    flush=True,
                )


if __name__ == "__main__":
    main()
