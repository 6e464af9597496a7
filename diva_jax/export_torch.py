"""Exports a tuned model, or converts CLIP weights of any supported format, for PyTorch libraries.

    python -m diva_jax.export_torch --workdir=runs/vitl14 --out=exports/tuned                   # open_clip
    python -m diva_jax.export_torch --workdir=runs/vitl14 --out=exports/llava --format=hf       # transformers, LLaVA
    python -m diva_jax.export_torch --source=ID_OR_FILE --out=exports/clip --format=hf           # a converter
    python -m diva_jax.export_torch --source=tower.pth --config=configs/vitl14.py --out=… --format=pt

The export is written to a temporary folder, read back and compared tensor by tensor. If the target library is
installed, one image and one text are encoded with it. The folder is renamed to --out only if all of this succeeds.
"""

import functools

import jax
from absl import flags

from diva_jax import config as configs
from diva_jax.common import cli
from diva_jax.common.errors import UserError
from diva_jax.models.backbones import spec_of
from diva_jax.weights.export import layouts, publish

_WORKDIR = flags.DEFINE_string("workdir", None, "The workdir of the run to export.")
_SOURCE = flags.DEFINE_string("source", None, "Instead of --workdir: a file, folder or hub id of CLIP weights.")
_CONFIG = cli.define_config("The config of a --source without a config file.")
_OUT = flags.DEFINE_string("out", None, "The folder to write; it must not exist or be empty.")
_FORMAT = flags.DEFINE_enum("format", "open_clip", layouts.FORMATS, "The format to write.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "A folder with the tokenizer's files, in place of the source's.")
_STEP = flags.DEFINE_integer("step", None, "The step of the checkpoint in --workdir; the default is the newest.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", layouts.DTYPES, "The dtype of the exported weights.")
_LICENSE = flags.DEFINE_string("license", "", "The card's license, as the hub has them: mit, apache-2.0, ...")
_BASE = flags.DEFINE_string("base_model", "", "The card's base model; the default is the source, if it is a hub id.")
_RESULTS = flags.DEFINE_string("results", "", "A results.json of diva_jax.evaluate, whose scores the card then has.")
_HUB = flags.DEFINE_string("push_to_hub", "", "USER/NAME of a hub repository, to which the export is then pushed.")
cli.define_trust()


def main() -> None:
    given, options = _WORKDIR.value or _SOURCE.value, (_LICENSE, _BASE, _RESULTS, _HUB, _TOKENIZER)
    if bool(_WORKDIR.value) == bool(_SOURCE.value):
        raise UserError("give either --workdir (a run) or --source (any CLIP weights)")
    if not _OUT.value:
        raise UserError("--out is missing: give a folder for the export, e.g. --out=runs/tuned")
    if _SOURCE.value and _STEP.value is not None:
        raise UserError("--step is for --workdir only: remove it, a --source has no steps")
    if _WORKDIR.value and _CONFIG.value is not None:
        raise UserError("--config is for --source only: remove it, the run of a --workdir has its own")
    # Only one image is encoded, and the reference is computed in float32.
    jax.config.update("jax_platforms", "cpu")
    spec = None if _CONFIG.value is None else spec_of(cli.config_of(_CONFIG))
    if _WORKDIR.value:
        configs.check_runs([given])
    card = publish.ExportOptions(*(flag.value or "" for flag in options))
    place = dict(run=bool(_WORKDIR.value), step=_STEP.value, spec=spec)
    publish.export(given, _OUT.value, _FORMAT.value, _DTYPE.value, card, **place)


entry = functools.partial(cli.run, main, described=configs.described)

if __name__ == "__main__":
    entry()
