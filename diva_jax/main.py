"""Trains: python -m diva_jax.main --config=configs/vitl14.py --workdir=runs/vitl14 [--config.FIELD=VALUE ...].

The same command again resumes from the last checkpoint, or says that the run is done. SIGTERM saves and ends
with exit code 0.
"""

from absl import flags
from ml_collections import config_flags

from diva_jax import errors
from diva_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config file; --config.a.b=VALUE changes one field.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and the config of this run go.")


def main() -> None:
    config = errors.config_of(_CONFIG)
    if not _WORKDIR.value:
        raise UserError("--workdir is missing: give a folder for checkpoints and metrics, e.g. --workdir=runs/tiny")
    from diva_jax.train import Run, say

    run = Run(config, _WORKDIR.value)
    if run.finished:
        say(f"{_WORKDIR.value}: all {run.total} steps are done; export with python -m diva_jax.export_torch")
    elif run.run():
        say(
            f"done: {run.total} steps; export with python -m diva_jax.export_torch --workdir={_WORKDIR.value} --out=DIR"
        )


if __name__ == "__main__":
    errors.run(main)
