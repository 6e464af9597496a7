"""The method at small size: python -m diva_jax.world.demo --out=runs/world, minutes on two CPU cores.

Tunes the kept CLIP with DIVA and, as a control, with the features of other images; scores the CLIP before and after
on pairs of images that differ in one fact; writes OUT/eval/report.html with the curves, the flipped pairs, and what
the generator makes of noisy images under the condition of the encoder before and after. Each step is an ordinary
command, which is printed; a step that is done is not repeated.
"""

import subprocess
import sys
from pathlib import Path

from diva_jax.common import json_files
from diva_jax.common.errors import RunError, UserError
from diva_jax.common.log import say
from diva_jax.common.results_schema import Results

_IMAGES, _TIMESTEP, _SEED = 6, 700, 9201  # Of the estimates.


def commands(out: Path, config: str, overrides: list[str], pairs: int) -> list[tuple[Path, list[str]]]:
    """What is run: (a file that is there once it is done, the command after `python -m`)."""
    from diva_jax.world import models

    tuned, control, data, found = (out / name for name in ("tuned", "control", "pairs", "eval"))
    train = ["diva_jax.main", f"--config={config}", *overrides]
    weights = [f"--weights={w}" for w in (models.WEIGHTS / models.CLIP, control, tuned)]
    evaluate = ["diva_jax.evaluate", f"--config={config}", *overrides, *weights, f"--control={control}"]
    return [
        (data / "Patterns.json", ["diva_jax.world.blindness", f"--out={data}", f"--pairs={pairs}"]),
        (tuned / "done", [*train, f"--workdir={tuned}"]),
        (control / "done", [*train, f"--workdir={control}", "--config.diva.condition_of=next"]),
        (found / "results.json", [*evaluate, "--task=mmvp", f"--data={data}", f"--out={found}"]),
    ]


def write_estimates(tuned: Path, control: Path, folder: Path) -> None:
    """Writes images, the generator's estimates of them from noisy ones, and images.json, which the report shows.

    The condition of the estimates is that of the CLIP before tuning (with the projection of the tuned run), after it,
    and of the control.

    Args:
      tuned, control: workdirs.
      folder: that of the report.
    """
    import numpy as np

    from diva_jax.training import load, workdirs
    from diva_jax.weights import writers
    from diva_jax.world import denoised, drawing, scenes

    run = workdirs.RunAt.open(str(tuned))
    images = drawing.draw(scenes.sample(np.random.default_rng(_SEED), _IMAGES))
    start, _ = load.initial_arrays(run.program, every_source=False)
    projection = {n: a for n, a in run.params.items() if n.startswith("visual_proj/")}
    weights = (start | projection, start | run.params, start | workdirs.RunAt.open(str(control)).params)
    columns = zip(
        ("image", "before", "tuned", "control"),
        (images, *denoised.estimates(run.program, weights, images, _TIMESTEP)),
        strict=True,
    )
    (folder / "estimates").mkdir(parents=True, exist_ok=True)
    rows: list[list[dict]] = [[] for _ in images]
    for caption, column in columns:
        for i, image in enumerate(column):
            file = f"estimates/{caption}_{i}.png"
            denoised.enlarged(image).save(folder / file)
            rows[i].append({"image": file, "caption": caption})
    note = (
        f"The generator's estimate of each image from its latents with the noise of timestep {_TIMESTEP}, the same "
        "noise in each row, under the condition of the encoder before tuning, after it, and of the control. What is "
        "right in an estimate comes from the noisy latents, the condition, or chance; the losses say which."
    )
    writers.write_json(folder / "images.json", {"title": "What the generator sees", "note": note, "rows": rows})


def _run(command: list[str]) -> None:
    say(f"$ python -m {' '.join(command)}")
    if subprocess.run([sys.executable, "-m", *command]).returncode:
        raise RunError(f"this command failed: python -m {' '.join(command)}")


def demo(out: Path, config: str, overrides: list[str], pairs: int) -> None:
    """Runs what is not done yet.

    Args:
      out: the folder.
      config, overrides: the config file and flags that change it.
      pairs: per fact.

    Raises:
      RunError: a command failed.
    """
    for done, command in commands(out, config, overrides, pairs):
        if not done.exists():
            _run(command)
    found = out / "eval"
    if not (found / "report.html").exists():
        write_estimates(out / "tuned", out / "control", found)
        _run(["diva_jax.report", str(found)])
    results = json_files.read(found / "results.json", Results, "remove the folder and run the demo again")
    for label, weights in results.tasks["mmvp"].weights.items():
        pairs, matches = (weights.scores[metric].score for metric in ("pooled", "pooled_match"))
        say(f"{label}: {pairs:.1f}% of pairs, {matches:.1f}% of matches")
    for entry in results.summary:
        say(f"{entry.what}: {entry.says}")
    say(f"the report: {found / 'report.html'}. One seed says little: see docs/DOES_IT_WORK.md")


def _main() -> None:
    given = flags.FLAGS
    if not given.out:
        raise UserError("--out is missing: give a folder, e.g. --out=runs/world")
    demo(Path(given.out), given.config, given.override, given.pairs)


if __name__ == "__main__":
    from absl import flags

    from diva_jax.common import cli

    # Here and not above: other modules of this package define --out as well.
    flags.DEFINE_string("out", None, "Folder for everything that is written.")
    flags.DEFINE_string("config", "configs/world.py", "The config file.")
    flags.DEFINE_multi_string("override", [], "A flag that changes the config: --override=--config.steps=50.")
    flags.DEFINE_integer("pairs", 40, "Pairs per fact.", 1)
    cli.run(_main)
