"""Compares full-size models with the original libraries, on the CPU in float32, and bfloat16 with float32.

    python bench/parity.py --config=configs/vitl14.py

open_clip and diffusers create the models with random weights, save them, and compute a reference. The files are then
loaded with this project's readers, and its models compute the same outputs. The exit code is 1 if a relative L2 error
is above 1e-4. The command needs torch, open_clip and diffusers (`pip install -e '.[test]'`), about 12 GiB of memory
and 8 GB of disk in --tmp, and takes minutes.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import originals
from absl import flags
from flax import nnx

from diva_jax import weights
from diva_jax.common import cli
from diva_jax.common.errors import RunError, UserError
from diva_jax.models.backbones import spec_of
from diva_jax.models.diffusion.unet import UNetConfig
from diva_jax.weights.export import layouts

_CONFIG = cli.define_config("The config whose backbone and U-Net are compared.")
_UNET = flags.DEFINE_bool("unet", True, "Whether to compare the U-Net too; it is the same for most configs.")
_TMP = flags.DEFINE_string("tmp", None, "Folder for temporary weight files; the default is the system's.")

BOUND = 1e-4


def error(ours, theirs) -> float:
    """Returns the relative L2 error, computed in float64."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def _run(function, model, *args) -> list[np.ndarray]:
    with jax.default_matmul_precision("highest"):
        return [np.asarray(y, np.float32) for y in nnx.jit(function)(model, *args)]


def features(spec, folder: Path) -> Iterator[tuple[str, float]]:
    """Compares the vision encoder's outputs with open_clip's, then bfloat16 with float32.

    Args:
      spec: the backbone.
      folder: a folder for the weights.

    Yields:
      (description, relative L2 error).
    """
    images = np.concatenate([layouts.test_image(spec), layouts.test_image(spec)[:, ::-1, ::-1] ** 2])
    theirs = originals.write_open_clip(folder, spec, images)

    def ours(dtype):
        tower = weights.load(str(folder), spec, dtype=dtype)
        return _run(lambda m, x: (m.encode(x).pooled, m.encode(x).tokens), tower, images)

    full = ours(jnp.float32)
    for name, a, b in zip(("pooled", "tokens"), full, theirs, strict=True):
        yield f"{name}, float32, against open_clip", error(a, b)
    for name, a, b in zip(("pooled", "tokens"), ours(jnp.bfloat16), full, strict=True):
        yield f"{name}, bfloat16 against float32", error(a, b)


def unet(options: dict, folder: Path) -> Iterator[tuple[str, float]]:
    """Compares the U-Net's output for the latents of one image with diffusers', then bfloat16 with float32.

    Args:
      options: the U-Net's options, see `presets`.
      folder: a folder for the weights.

    Yields:
      (description, relative L2 error).
    """
    config = UNetConfig.from_dict(options)
    rng = np.random.default_rng(0)
    side = config.sample_size if isinstance(config.sample_size, int) else 64
    inputs = [
        rng.standard_normal((1, side, side, config.in_channels), np.float32),
        np.asarray([421]),
        rng.standard_normal((1, 77, config.cross_attention_dim), np.float32),
    ]
    if config.class_embed_dim is not None:
        inputs.append(rng.standard_normal((1, config.class_embed_dim), np.float32))
    theirs = originals.write_diffusers_unet(folder, options, *inputs)

    def ours(dtype):
        model = weights.load(str(folder), config, dtype=dtype, param_dtype=dtype)
        return _run(lambda m, *x: (m(*x),), model, *inputs)[0]

    full = ours(jnp.float32)
    yield "U-Net output, float32, against diffusers", error(full, theirs)
    yield "U-Net output, bfloat16 against float32", error(ours(jnp.bfloat16), full)


def main() -> None:
    config = cli.config_of(_CONFIG)
    jax.config.update("jax_platforms", "cpu")
    for library in ("open_clip", "diffusers"):
        if not layouts.available(library):
            raise UserError(f"{library} cannot be imported: pip install -e '.[test]'")
    spec, wrong = spec_of(config), []

    def show(rows):
        for what, value in rows:
            print(f"{what:<45}{value:.1e}", flush=True)
            if " against float32" not in what and not value <= BOUND:
                wrong.append(what)

    print(f"{spec.open_clip_name}, {spec.image_size} px", flush=True)
    with tempfile.TemporaryDirectory(dir=_TMP.value) as tmp:
        show(features(spec, Path(tmp)))
    if _UNET.value:
        with tempfile.TemporaryDirectory(dir=_TMP.value) as tmp:
            show(unet(config.diffusion.unet.to_dict(), Path(tmp)))
    if wrong:
        raise RunError(f"the relative error is above {BOUND:.0e}: {', '.join(wrong)}")


if __name__ == "__main__":
    cli.run(main)
