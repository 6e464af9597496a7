"""Full-size round trip: open_clip's file -> our modules -> exports -> read again, bit-identical in float32.

    python bench/roundtrip.py --config=configs/vitl14.py

open_clip creates and saves the model with random weights. Both towers are loaded into our modules (transposed to our
layout and back) and exported as an open_clip folder and as a transformers folder. Every tensor of both exports is
compared with the original file, and open_clip and transformers encode an image and a text with their export. The exit
code is 1 if a bit or an embedding differs.
"""

import gc
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import originals
from absl import flags
from flax import nnx

from diva_jax import weights
from diva_jax.common import cli
from diva_jax.common.errors import RunError, UserError, listing
from diva_jax.models.backbones import spec_of
from diva_jax.weights import formats, names, origins
from diva_jax.weights.export import layouts
from diva_jax.weights.formats import Tensors

_CONFIG = cli.define_config("The config whose backbone is exported.")
_TMP = flags.DEFINE_string("tmp", None, "Folder for temporary files; the default is the system's.")


def through_our_modules(folder: Path, spec) -> origins.ClipSource:
    """Returns the source in `folder`, with the tensors of each tower taken from our module loaded from it."""
    source = origins.open_source(str(folder))
    scales = {n: np.asarray(t) for n, t in source.tensors.items() if n.startswith("logit_")}
    found = {}
    for tower, table in (("vision", names.table("vision", spec)), ("text", names.table("text", spec))):
        found |= names.to_torch(nnx.state(weights.load(str(folder), spec, tower=tower)), table)
        gc.collect()  # Modules contain reference cycles. This frees their memory for the next tower.
    return origins.ClipSource(str(folder), source.kind, Tensors(found | scales, source.tensors.files), source.spec)


def compare(original: Path, out: Path) -> int:
    """Compares the tensors of an export with those of the file that open_clip wrote.

    Returns:
      The number of tensors.

    Raises:
      RunError: a tensor differs, is missing, or is not in the original file.
    """
    file = formats.open_file(original / "open_clip_model.safetensors")
    back = origins.open_source(str(out)).tensors
    wrong = [n for n in file if n not in back or not np.array_equal(np.asarray(file[n]), np.asarray(back[n]))]
    wrong += [n for n in back if n not in file]
    if wrong:
        raise RunError(f"{out}: {listing(wrong, 5)} differ from the original")
    return len(back)


def main() -> None:
    config = cli.config_of(_CONFIG)
    jax.config.update("jax_platforms", "cpu")
    for library in ("open_clip", "transformers"):
        if not layouts.available(library):
            raise UserError(f"{library} cannot be imported: pip install -e '.[test]'")
    spec = spec_of(config)
    with tempfile.TemporaryDirectory(dir=_TMP.value) as tmp:
        original = Path(tmp) / "original"
        original.mkdir()
        originals.save_open_clip(originals.new_open_clip(spec), spec, original)
        gc.collect()
        began = time.perf_counter()
        ours = through_our_modules(original, spec)
        print(f"{spec.open_clip_name}, {spec.image_size} px", flush=True)
        for fmt in ("open_clip", "hf"):
            out = Path(tmp) / fmt
            layouts.export(ours, spec, out, fmt)
            count = compare(original, out)
            print(f"{fmt}: all {count} tensors are bit-identical to those of the original file", flush=True)
        print(f"{time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    cli.run(main)
