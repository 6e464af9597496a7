"""Makes the world's models: python -m diva_jax.world.pretrain --out=runs/world

A CLIP on biased captions, a CLIP and a text-conditioned generator on rich ones, and a generator conditioned on the
embedding of the first CLIP, each trained by the ordinary train loop from random weights; then DIVA's projection alone,
from the first CLIP to the first generator. The same command resumes where it stopped.
The results are written to OUT/weights in the layouts of open_clip and diffusers, rounded to float16, with a card;
copied to diva_jax/world/weights they are what every other command of the world starts from.
"""

import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from diva_jax.common.errors import UserError
from diva_jax.world import objectives


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
    fields: Mapping[str, object]


STAGES = {
    "clip": Stage(objectives.CLIP, "biased", 1001, {"steps": 3000, "optim.lr": 1e-3, "optim.warmup": 0.05}),
    "teacher": Stage(objectives.CLIP, "rich", 1005, {"steps": 3000, "optim.lr": 1e-3, "optim.warmup": 0.05}),
    "generator": Stage(objectives.LATENT, "rich", 1002, {"steps": 4000, "optim.warmup": 0.05, "ema.decay": 0.99}),
    "unclip": Stage(
        "unclip",
        "biased",
        1003,
        {
            "steps": 2000,
            "optim.lr": 1e-3,
            "optim.warmup": 0.05,
            "ema.decay": 0.99,
            "unclip.latents": "mean",
            "trainable": (("unet/.*", 1.0), (".*", 0.0)),
        },
    ),
    "projection": Stage(
        "diva",
        "biased",
        1006,
        {
            "steps": 1500,
            "optim.name": "adamw",
            "optim.lr": 2e-3,
            "optim.warmup": 0.05,
            "diva.draws": 1,
            "trainable": (("visual_proj/.*", 1.0), (".*", 0.0)),
        },
    ),
}


def stage_config(name: str, out: Path, shorter: float = 1.0, batch_size: int = 64):
    """The config of a stage that starts from `out/start` and, for `unclip`, from the CLIP of `out/weights`."""
    from diva_jax.world import models, records

    stage = STAGES[name]
    c = models.base_config(stage.objective, models.UNCLIP_DIFFUSION if name == models.UNCLIP else None)
    fields = dict(stage.fields)
    steps = max(2, round(shorter * fields.pop("steps")))
    table = fields.pop("trainable", None)
    c.update(batch_size=batch_size, accum=1, steps=steps)
    c.update_from_flattened_dict(fields)
    if table:
        c.trainable = table
    c.checkpoint.every, c.checkpoint.keep = 200, 1
    c.data.path = records.path(stage.seed, stage.captions)
    from_random = stage.objective == objectives.CLIP
    c.backbone.source = str(out / "start" / name if from_random else out / "weights" / models.CLIP)
    if "diffusion" in c:
        c.diffusion.source = str(
            out / "weights" / models.GENERATOR if stage.objective == "diva" else out / "start" / name
        )
    return c


def write_start(out: Path) -> None:
    """Writes the random weights that the stages start from, if they are not there."""
    from diva_jax.world import models

    start = out / "start"
    makers = {
        models.CLIP: lambda folder: models.write_new_clip(folder, seed=1),
        models.TEACHER: lambda folder: models.write_new_clip(folder, seed=4),
        models.GENERATOR: lambda folder: models.write_new_diffusion(folder, models.DIFFUSION, seed=2),
        models.UNCLIP: lambda folder: models.write_new_diffusion(folder, models.UNCLIP_DIFFUSION, seed=3),
    }
    for name, make in makers.items():
        if not (start / name).exists():
            partial = start / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            make(partial)
            partial.rename(start / name)


def write_result(name: str, out: Path) -> None:
    """Writes what a finished stage has trained to `out/weights/NAME`."""
    folder = out / "weights" / name
    partial = folder.with_name(f"{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    _fill(name, out, partial)
    partial.rename(folder)


def _fill(name: str, out: Path, folder: Path) -> None:
    from flax import nnx

    from diva_jax.models.backbones.shared.open_clip_config import to_open_clip
    from diva_jax.training import partition, workdirs
    from diva_jax.weights import names, runs, writers
    from diva_jax.world import captions, models, vocabulary

    workdir = out / "runs" / name
    if STAGES[name].objective == objectives.CLIP:
        source = runs.open_run(str(workdir))
        writers.write_open_clip(folder, models.rounded(source.tensors), to_open_clip(models.SPEC))
        vocabulary.write(folder, captions.WORDS, models.TOKENS)
        return
    run = workdirs.RunAt.open(str(workdir))
    if name == models.PROJECTION:
        folder.mkdir(parents=True)
        kept = {n: a for n, a in run.params.items() if n.startswith("visual_proj/")}
        writers.write_safetensors(folder / models.PROJECTION_FILE, models.rounded(kept))
        return
    shutil.copytree(out / "start" / name, folder)
    diffusion = models.UNCLIP_DIFFUSION if name == models.UNCLIP else models.DIFFUSION
    variables = run.program.skeleton.variables
    for part in dict.fromkeys(n.split("/")[0] for n in run.params):
        filled = {
            path[1:]: var.replace(run.params[partition.name_of(path)])
            for path, var in variables.values()
            if str(path[0]) == part
        }
        tensors = names.to_torch(nnx.from_flat_state(filled), models.TABLES[part])
        models.write_part(folder, part, diffusion[part], models.rounded(tensors))


def commit() -> str:
    """The commit of the source code, or "unknown" outside of a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else "unknown"


def pretrain(out: Path, shorter: float, batch_size: int, say: Callable[[str], None]) -> bool:
    """Runs or resumes all stages; returns whether all are finished."""
    from diva_jax.training.loop import Run

    write_start(out)
    for name in STAGES:
        run = Run(stage_config(name, out, shorter, batch_size), str(out / "runs" / name))
        if not run.finished and not run.run():
            return False
        if not (out / "weights" / name).exists():
            write_result(name, out)
        say(f"{name}: {out / 'weights' / name}")
    return True


def _main() -> None:
    if not flags.FLAGS.out:
        raise UserError("--out is missing: give a folder, e.g. --out=runs/world")
    from diva_jax.common.log import say

    given = flags.FLAGS
    if not pretrain(Path(given.out), given.shorter, given.batch_size, say):
        say("stopped; the same command resumes")


if __name__ == "__main__":
    from absl import flags

    from diva_jax.common import cli

    # Here and not above: other modules of this package define --out as well.
    flags.DEFINE_string("out", None, "Folder for the runs and the weights.")
    flags.DEFINE_float("shorter", 1.0, "Factor for the number of steps, to try the command.", 0.0, 1.0)
    flags.DEFINE_integer("batch_size", 64, "Images per step.", 2)
    cli.run(_main)
