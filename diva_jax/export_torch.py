"""Exports a tuned model, or converts any checkpoint that can be read, for PyTorch tools.

    python -m diva_jax.export_torch --workdir=runs/vitl14 --out=exports/tuned                   # open_clip
    python -m diva_jax.export_torch --workdir=runs/vitl14 --out=exports/llava --format=hf       # transformers, LLaVA
    python -m diva_jax.export_torch --source=ViT-L-14.pt --out=exports/openai --format=hf       # a converter
    python -m diva_jax.export_torch --source=tower.pth --config=configs/vitl14.py --out=… --format=pt

The export is written beside --out, read back, compared leaf by leaf, run through the library that it is for (where
that is installed), and only then renamed.
"""

from absl import flags
from ml_collections import config_flags

from diva_jax.common import cli, paths
from diva_jax.common.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "The run to export from.")
_SOURCE = flags.DEFINE_string("source", None, "Instead of --workdir: any file, folder or hub id of CLIP weights.")
_CONFIG = config_flags.DEFINE_config_file("config", None, "For a --source that does not describe itself.")
_OUT = flags.DEFINE_string("out", None, "The folder to write; it must not exist yet, or be empty.")
_FORMAT = flags.DEFINE_enum("format", "open_clip", ("open_clip", "hf", "pt"), "The layout to write.")
_STEP = flags.DEFINE_integer("step", None, "Of --workdir's checkpoint; default the newest.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ("float32", "float16", "bfloat16"), "What weights are written in.")


def _from_source():
    from diva_jax.models.backbones import spec_of
    from diva_jax.weights import sources

    source = sources.open_clip_source(_SOURCE.value)
    if _CONFIG.value is not None:
        return source, spec_of(cli.config_of(_CONFIG))
    return source, source.described(_SOURCE.value)


def main() -> None:
    if bool(_WORKDIR.value) == bool(_SOURCE.value):
        raise UserError("give either --workdir (a run) or --source (any CLIP weights)")
    if not _OUT.value:
        raise UserError("--out is missing: give a folder for the export, e.g. --out=runs/tuned")
    if _SOURCE.value and _STEP.value is not None:
        raise UserError("--step goes with --workdir: a --source has no steps")
    import jax

    # One image is all that is computed, and the reference runs in float32.
    jax.config.update("jax_platforms", "cpu")
    from diva_jax.export import cards, layouts, runs
    from diva_jax.weights import writers

    out = paths.local(_OUT.value, "--out")
    writers.refuse_taken(out)
    if _WORKDIR.value:
        source, provenance = runs.run_source(_WORKDIR.value, _STEP.value)
        spec = source.spec
    else:
        (source, spec), provenance = _from_source(), None
    card = cards.card(source, spec, _FORMAT.value, _DTYPE.value, provenance)
    layouts.export(source, spec, out, _FORMAT.value, dtype=_DTYPE.value, card=card)


if __name__ == "__main__":
    cli.run(main)
