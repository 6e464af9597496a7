"""Trains the models of the small world: python -m diva_jax.world.pretrain --out=runs/world_models

A CLIP on biased captions, a CLIP and a text-conditioned generator on rich ones, and a generator conditioned on the
embedding of the first CLIP, each trained with the package's own steps from random weights; then DIVA's projection
alone, from the first CLIP to the first generator. The same command goes on with the models that are not there yet.
The results are written to OUT/weights in the layouts of open_clip and diffusers, rounded to float16, with a card;
copied to diva_jax/world/weights they are what every other command of the world starts from.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from flax import nnx

from diva_jax import world
from diva_jax.common.log import say
from diva_jax.models.backbones.shared.open_clip_config import to_open_clip
from diva_jax.training import partition, workdirs
from diva_jax.training.step import Program, Steps
from diva_jax.weights import formats, names
from diva_jax.world import models, objectives, records, tuning


class Stage(NamedTuple):
    """One model to train.

    Attributes:
      objective: as in a config.
      captions: a key of `captions.KINDS`.
      seed: of the training data; no two stages and no test see the same scenes.
      fields: of the config, by dotted name.
    """

    objective: str
    captions: str
    seed: int
    fields: dict[str, object]


_CLIP = {"steps": 1000, "batch_size": 256, "optim.lr": 1e-3, "optim.warmup": 0.1}
_GENERATOR = {"steps": 1500, "batch_size": 128, "optim.lr": 1.5e-3, "optim.warmup": 0.05, "ema.decay": 0.99}
_UNCLIP = {"unclip.latents": "mean", "trainable": (("unet/.*", 1.0), (".*", 0.0))}
_PROJECTION = {
    "steps": 1000,
    "batch_size": 128,
    "optim.name": "adamw",
    "optim.lr": 2e-3,
    "optim.warmup": 0.05,
    "diva.draws": 1,
    "trainable": (("visual_proj/.*", 1.0), (".*", 0.0)),
}
STAGES = {
    "clip": Stage(objectives.CLIP, "biased", 1001, _CLIP),
    "teacher": Stage(objectives.CLIP, "rich", 1005, _CLIP),
    "generator": Stage(objectives.LATENT, "rich", 1002, _GENERATOR),
    "unclip": Stage("unclip", "biased", 1003, _GENERATOR | _UNCLIP | {"steps": 1000}),
    "projection": Stage("diva", "biased", 1006, _PROJECTION),
}


def stage_config(name: str, out: Path, shorter: float = 1.0):
    """The config of a stage that starts from `out/start` or from what earlier stages wrote to `out/weights`; `shorter`
    is a factor for the number of steps and the images of each."""
    stage = STAGES[name]
    c = models.base_config(stage.objective, models.UNCLIP_DIFFUSION if name == models.UNCLIP else None)
    sizes = {n: max(least, round(shorter * stage.fields[n])) for n, least in (("steps", 2), ("batch_size", 8))}
    c.update_from_flattened_dict(stage.fields | sizes)
    c.accum, c.seed, c.data.path = 1, stage.seed, records.path(stage.seed, stage.captions)
    from_random = stage.objective == objectives.CLIP
    c.backbone.source = str(out / "start" / name if from_random else out / "weights" / models.CLIP)
    if "diffusion" in c:
        from_kept = stage.objective == "diva"
        c.diffusion.source = str(out / "weights" / models.GENERATOR if from_kept else out / "start" / name)
    return c


def write_start(name: str, folder: Path) -> None:
    """Writes the random weights that a stage starts from, unless they are there or it starts from earlier stages."""
    kind = {models.GENERATOR: models.DIFFUSION, models.UNCLIP: models.UNCLIP_DIFFUSION}.get(name)
    if folder.exists() or name == models.PROJECTION:
        return
    with formats.new_folder(folder) as partial:
        if kind:
            models.write_new_diffusion(partial, kind, seed=STAGES[name].seed)
        else:
            models.write_new_clip(partial, seed=STAGES[name].seed)


def write_result(name: str, start: Path, folder: Path, program: Program, arrays: Mapping[str, jax.Array]) -> None:
    """Writes what a stage has trained, rounded to float16, in the layout of `start`."""
    skeleton, arrays = program.skeleton, {n: np.asarray(a) for n, a in arrays.items()}
    if name == models.PROJECTION:
        kept = {n: a for n, a in arrays.items() if n.startswith("visual_proj/")}
        formats.write_safetensors(folder / models.PROJECTION_FILE, models.rounded(kept))
        return
    shutil.copytree(start, folder, dirs_exist_ok=True)

    def tensors(part: str, table) -> dict[str, np.ndarray]:
        chosen = [(path, var) for path, var in skeleton.variables.values() if str(path[0]) == part]
        filled = {path[1:]: var.replace(arrays[partition.name_of(path)]) for path, var in chosen}
        return names.to_torch(nnx.from_flat_state(filled), table)

    if STAGES[name].objective == objectives.CLIP:
        towers = {"vision": names.table("vision", models.SPEC), "text": names.table("text", models.SPEC)}
        found = {k: v for part, table in towers.items() for k, v in tensors(part, table).items()}
        found["logit_scale"] = arrays["logit_scale"]
        formats.write_open_clip(folder, models.rounded(found), to_open_clip(models.SPEC))
        return
    diffusion = models.UNCLIP_DIFFUSION if name == models.UNCLIP else models.DIFFUSION
    for part in dict.fromkeys(n.split("/")[0] for n in program.trained):
        models.write_part(folder, part, diffusion[part], models.rounded(tensors(part, models.TABLES[part])))


def pretrain(out: Path, shorter: float = 1.0) -> None:
    """Makes all stages whose weights are not there."""
    for name in STAGES:
        folder, start = out / "weights" / name, out / "start" / name
        if not folder.exists():
            write_start(name, start)
            config = stage_config(name, out, shorter)
            program = Program(config, partition.make_mesh(config.mesh, jax.devices()[:1]))
            ((_, arrays, loss),) = tuning.trained(Steps(program), workdirs.initial_arrays(program)[0])
            with formats.new_folder(folder) as partial:
                write_result(name, start, partial, program, arrays)
            say(f"{name}: loss {loss:.4f}")
        say(f"{name}: {folder}")


def _main() -> None:
    pretrain(world.folder(flags.FLAGS.out, "runs/world_models"), flags.FLAGS.shorter)


if __name__ == "__main__":
    flags.DEFINE_float("shorter", 1.0, "Factor for steps and images, to try the command.", 0.0, 1.0)
    world.run(_main, "Folder for the runs and the weights.")
