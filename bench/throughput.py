"""Compares the throughput of ViT-L/14 features on this machine with open_clip's [images/s].

    python bench/throughput.py --pairs=5

Both sides use the same weights (random, float32) and the same decoded photographs in memory. The measured time covers
resizing, cropping, normalisation and encoding. The two sides are measured alternately, so that other load on the
machine affects both. The script prints each measurement, the medians, and the relative difference of the embeddings.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

from absl import app, flags

_MODEL = flags.DEFINE_string("backbone", "vitl14", "A key of diva_jax.models.backbones.TABLE.")
_PAIRS = flags.DEFINE_integer("pairs", 5, "Number of measurements per side.")
_IMAGES = flags.DEFINE_integer("images", 8, "Images per measurement.")
_BATCH = flags.DEFINE_integer("batch_size", 8, "Batch size.")


def _photographs(count: int) -> list:
    import skimage.data
    from PIL import Image

    names = ("astronaut", "coffee", "chelsea", "rocket")
    return [Image.fromarray(getattr(skimage.data, names[i % 4])()) for i in range(count)]


def _theirs(model, transform, photographs):
    import torch

    torch.set_num_threads(os.cpu_count())

    def run():
        out = []
        with torch.inference_mode():
            for start in range(0, len(photographs), _BATCH.value):
                batch = torch.stack([transform(p) for p in photographs[start : start + _BATCH.value]])
                out.append(model.encode_image(batch))
        return torch.cat(out).numpy()

    return run


def _ours(folder: str, spec, photographs):
    from diva_jax import config
    from diva_jax.evals import Settings, encode
    from diva_jax.training import partition

    mesh = partition.make_mesh(config.default(spec).mesh)
    arrays = encode.tower("vision", folder, spec, mesh, 2**18)
    towers = encode.Towers(spec, mesh, Settings(batch_size=_BATCH.value))
    return lambda: towers.images(arrays, photographs.__getitem__, len(photographs))["pooled"]


def main(_) -> None:
    import numpy as np

    from diva_jax.models import backbones
    from diva_jax.weights.export import layouts

    if not layouts.available("open_clip"):
        raise SystemExit("this comparison needs torch and open_clip: pip install -e '.[test]'")
    import open_clip
    import originals

    spec, photographs = backbones.TABLE[_MODEL.value], _photographs(_IMAGES.value)
    transform = open_clip.image_transform(
        spec.image_size,
        is_train=False,
        mean=spec.mean,
        std=spec.std,
        resize_mode=spec.resize_mode,
        interpolation=spec.interpolation,
    )
    with tempfile.TemporaryDirectory() as tmp:
        model = originals.new_open_clip(spec).eval()
        originals.save_open_clip(model, spec, Path(tmp))
        sides = {"open_clip": _theirs(model, transform, photographs), "diva_jax": _ours(tmp, spec, photographs)}
    # The first run of each side is not timed, because it includes compilation and initialisation.
    features = {name: run() for name, run in sides.items()}
    gap = np.linalg.norm(features["diva_jax"] - features["open_clip"]) / np.linalg.norm(features["open_clip"])
    how = f"{os.cpu_count()} cores, float32, batches of {_BATCH.value}"
    print(f"{spec.open_clip_name}, {how}; embeddings differ by {gap:.1e}")
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for pair in range(_PAIRS.value):
        for name in sides if pair % 2 == 0 else reversed(sides):
            began = time.perf_counter()
            sides[name]()
            rates[name].append(len(photographs) / (time.perf_counter() - began))
        print("  ".join(f"{name} {r[-1]:.3f} images/s" for name, r in rates.items()), flush=True)
    middle = {name: statistics.median(r) for name, r in rates.items()}
    print("median  " + "  ".join(f"{name} {m:.3f} images/s" for name, m in middle.items()))
    ratio = statistics.median(ours / theirs for theirs, ours in zip(*rates.values(), strict=True))
    print(f"ours / theirs, median of the pairs: {ratio:.2f}")


if __name__ == "__main__":
    app.run(main)
