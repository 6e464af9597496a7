"""Tunes the small world's CLIP as a demo: python -m diva_jax.world.demo --out=runs/world, minutes on two cores.

Tunes the kept CLIP with the generator as a judge of texts, with its control, and with DIVA; scores all on pairs of
images that differ in one fact; writes OUT/eval/report.html with the curves and the flipped pairs; and prints the
endpoints of the experiment beside what its seeds had. Each step is an ordinary command, which is printed; a step that
is done is not repeated.
"""

import json
import subprocess
import sys
from pathlib import Path

from absl import flags

from diva_jax import world
from diva_jax.common import json_files, paths
from diva_jax.common.errors import RunError, UserError
from diva_jax.common.log import say

ARMS = ("judge", "judge_control", "diva")
SCORES = Path(__file__).parent / "weights" / "scores.json"  # Of the experiment's seeds, see `comparison.scores`.


def commands(out: Path, overrides: list[str], pairs: int) -> list[tuple[Path, list[str]]]:
    """What is run: (a file that is there once it is done, the command after `python -m`)."""
    from diva_jax.world import arms, models

    budget = arms.Budget()
    overrides = [f"--config.steps={budget.early // budget.batch_size}", *overrides]
    data, found, control = out / "pairs", out / "eval", out / "judge_control"
    train = [
        (out / arm / "done", ["diva_jax.main", f"--config=world:{arm}", f"--workdir={out / arm}", *overrides])
        for arm in ARMS
    ]
    weights = [f"--weights={w}" for w in (models.WEIGHTS / models.CLIP, control, out / "judge", out / "diva")]
    evaluate = ["diva_jax.evaluate", "--config=world", *overrides, *weights, f"--control={control}", "--task=mmvp"]
    return [
        (data / "Patterns.json", ["diva_jax.world.blindness", f"--out={data}", f"--pairs={pairs}"]),
        *train,
        (found / "results.json", [*evaluate, f"--data={data}", f"--out={found}"]),
        (found / "report.html", ["diva_jax.report", str(found)]),
    ]


def table(out: Path, pairs: int) -> str:
    """The endpoints of the runs, each beside the range that the seeds of the experiment had, in Markdown."""
    from diva_jax.training import workdirs
    from diva_jax.world import blindness, tuning
    from diva_jax.world.endpoints import DRIFT, ENDPOINTS

    examiner, kept = tuning.Examiner(blindness.Tests.make(count=pairs)), json.loads(SCORES.read_text())["early"]
    rows = {"untuned": {}}
    for arm in ARMS:
        run = workdirs.RunAt.open(str(out / arm))
        rows[arm] = run.program.towers(run.params)
    lines = ["| | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
    found = {arm: examiner(towers) for arm, towers in rows.items()}
    here = {name: {arm: e.score(found[arm]) for arm in rows} for name, e in ENDPOINTS.items()}
    here[DRIFT] = {arm: examiner.drift(towers) for arm, towers in rows.items()}
    for name, scores in here.items():
        form, cells = ".3f" if name == DRIFT else ".1f", []
        for arm, score in scores.items():
            each = kept[arm][name]
            span = "" if arm == "untuned" else f" ({min(each):{form}} to {max(each):{form}})"
            cells.append(f"{score:{form}}{span}")
        title = ENDPOINTS[name].title if name in ENDPOINTS else "drift, 1 - cosine"
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _run(command: list[str]) -> None:
    say(f"$ python -m {' '.join(command)}")
    if subprocess.run([sys.executable, "-m", *command]).returncode:
        raise RunError(f"this command failed: python -m {' '.join(command)}")


def demo(out: Path, overrides: list[str], pairs: int) -> None:
    """Runs what is not done yet, with `pairs` per fact; `overrides` are flags that change the config. A UserError where
    the folder was made with others; a RunError where a command failed."""
    given, file = {"override": overrides, "pairs": pairs}, out / "flags.json"
    if (there := json_files.read(file, dict, "remove it", given)) != given:
        raise UserError(f"--out={out} was made with other flags ({there}): give the same ones, or remove the folder")
    paths.write_whole(file, json.dumps(given))
    for done, command in commands(out, overrides, pairs):
        if not done.exists():
            _run(command)
    say(table(out, pairs))
    seeds = len(json.loads(SCORES.read_text())["early"][ARMS[0]]["matches"])
    say(f"in brackets: the range of {seeds} seeds in docs/DOES_IT_WORK.md, which says what follows")
    say(f"the report: {out / 'eval' / 'report.html'}")


def _main() -> None:
    given = flags.FLAGS
    demo(world.folder(given.out, "runs/world"), given.override, given.pairs)


if __name__ == "__main__":
    flags.DEFINE_multi_string("override", [], "A flag for the config, repeatable: --override=--config.steps=50.")
    flags.DEFINE_integer("pairs", 100, "Pairs per fact.", 1)
    world.run(_main, "Folder for everything that is written.")
