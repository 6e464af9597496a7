"""Encodes a data set into a cache: python -m diva_jax.cache_latents --config=configs/vitl14.py --out=DIR [--crops=4].

Writes what the objective's frozen models make of crops of every image of `config.data.path`, with the crops' boxes: the
moments of a VAE, the embeddings that the terms of the config compare with, a teacher's tokens. Runs with
`--config.data.latents=DIR` read them, do not load these models, and show the tower the same crops. With the same
`config.seed`, the first epochs see the crops that they would see without the cache.

The same command goes on where it was ended, at the last complete shard. Several processes (see `diva_jax.main`) share
the work.
"""

from absl import flags

from diva_jax import config as configs
from diva_jax.common import cli
from diva_jax.common.errors import UserError
from diva_jax.training import distributed

_CONFIG = cli.define_config()
_OUT = flags.DEFINE_string("out", None, "Folder of the cache, one for all processes.")
_CROPS = flags.DEFINE_integer("crops", 1, "Crops per image; epoch e of a run uses crop e modulo this number.", 1)
_PER_SHARD = flags.DEFINE_integer("per_shard", 1024, "Images per shard; what is lost at most when the command ends.", 1)
_BATCH = flags.DEFINE_integer("batch_size", 8, "Crops that a device encodes at the same time.", 1)
_JOIN = flags.DEFINE_integer("join_timeout", 300, "Seconds within which all processes must start.", 1)


def main() -> None:
    config = cli.config_of(_CONFIG)
    if not _OUT.value:
        raise UserError("--out is missing: give a folder for the cache, e.g. --out=data/latents")
    from diva_jax.training.cache_builder import Builder

    with distributed.session(_JOIN.value):
        configs.validate(config, 1)
        Builder(config, _OUT.value, _CROPS.value, _PER_SHARD.value, _BATCH.value).run()


if __name__ == "__main__":
    cli.run(main, described=configs.described)
