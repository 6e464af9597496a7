"""Compares time and memory to load Stable Diffusion's U-Net and ViT-L/14 from safetensors with PyTorch.

    python bench/load_weights.py            # alternating measurements, each in its own process

PyTorch: `safetensors.torch.load_file`, construction of diffusers' U-Net and open_clip's vision tower, and
`load_state_dict`. Ours: `weights.load` of both, until the arrays are on the device. The files have random float32
weights of full size, and are in the page cache. Memory is the increase of the process's peak memory, divided by the
size of the weights.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

_PAIRS = flags.DEFINE_integer("pairs", 3, "Number of measurements per side.")
_TMP = flags.DEFINE_string("tmp", None, "Folder for temporary files (5 GB); the default is the system's.")
_SIDE = flags.DEFINE_enum(
    "side", None, ("torch", "ours", "ours-bfloat16", "write"), "Internal: the side to measure once."
)
_FOLDER = flags.DEFINE_string("folder", None, "Internal: the folder of the files.")


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _write(folder: Path) -> None:
    import originals
    from diffusers import UNet2DConditionModel

    from diva_jax.models import backbones
    from diva_jax.models.diffusion.presets import preset

    spec = backbones.TABLE["vitl14"]
    (folder / "clip").mkdir()
    originals.save_open_clip(originals.new_open_clip(spec), spec, folder / "clip")
    UNet2DConditionModel.from_config(preset("sd21_base")["unet"]).save_pretrained(folder / "unet")


def _torch(folder: Path):
    import open_clip
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file

    def measured():
        state = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        unet.load_state_dict(state)
        state = load_file(folder / "clip/open_clip_model.safetensors")
        state = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
        cfg = open_clip.get_model_config("ViT-L-14-quickgelu")
        vision = open_clip.model._build_vision_tower(
            cfg["embed_dim"], open_clip.CLIPVisionCfg(**cfg["vision_cfg"]), quick_gelu=True
        )
        vision.load_state_dict(state)
        return sum(p.numel() * p.element_size() for m in (unet, vision) for p in m.parameters()), (unet, vision)

    return measured


def _ours(folder: Path, dtype: str):
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from diva_jax import weights
    from diva_jax.models import backbones
    from diva_jax.models.diffusion.presets import preset
    from diva_jax.models.diffusion.unet import UNetConfig

    jax.config.update("jax_platforms", "cpu")
    jax.devices()

    def measured():
        unet = weights.load(
            str(folder), UNetConfig.from_dict(preset("sd21_base")["unet"]), param_dtype=jnp.dtype(dtype)
        )
        vision = weights.load(str(folder / "clip"), backbones.TABLE["vitl14"])
        leaves = jax.block_until_ready(jax.tree.leaves([nnx.state(unet), nnx.state(vision)]))
        return sum(a.nbytes for a in leaves), (unet, vision)

    return measured


def _measure(side: str, folder: Path) -> None:
    from diva_jax.weights.export import layouts

    if side in ("torch", "write"):
        assert layouts.available("open_clip") and layouts.available("diffusers")
    if side == "write":
        _write(folder)
        return
    measured = _torch(folder) if side == "torch" else _ours(folder, "bfloat16" if "bf" in side else "float32")
    before, began = _peak(), time.perf_counter()
    size, _ = measured()
    took = time.perf_counter() - began
    print(
        f"{side:<15}{took:6.1f} s   {size / 2**30:5.2f} GiB held   peak {(_peak() - before) / size:4.2f} x", flush=True
    )


def main(_) -> None:
    if _SIDE.value:
        _measure(_SIDE.value, Path(_FOLDER.value))
        return
    with tempfile.TemporaryDirectory(dir=_TMP.value) as tmp:

        def run(side: str):
            subprocess.run([sys.executable, __file__, f"--side={side}", f"--folder={tmp}"], check=True)

        run("write")
        for _ in range(_PAIRS.value):
            for side in ("torch", "ours"):
                run(side)
        run("ours-bfloat16")


if __name__ == "__main__":
    app.run(main)
