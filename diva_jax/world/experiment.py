"""Does the method work? python -m diva_jax.world.experiment --out=runs/experiment [--arms=untuned,stages,shuffled]

Tunes the kept CLIP with each arm of `arms.ARMS` and several seeds, runs the tests of `blindness`, and writes one line
per run to OUT/results.jsonl, then the comparison to OUT/table.md and OUT/pareto.png. The same command goes on with the
runs that are not there yet. docs/DOES_IT_WORK.md has the results.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diva_jax.common import log, paths
from diva_jax.common.errors import UserError, listing
from diva_jax.common.log import say
from diva_jax.training import compiler
from diva_jax.world import comparison, models
from diva_jax.world.arms import ARMS, KEPT, RANDOM, Arm, arm_config
from diva_jax.world.blindness import PAIRS, Tests, summary
from diva_jax.world.tuning import Judge, Tuner

RESULTS = "results.jsonl"


def read(path: Path) -> list[dict]:
    """The runs of results.jsonl; a last line that was cut off is left out.

    Raises:
      UserError: another line is broken.
    """
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as e:
            if number < len(lines):
                raise UserError(f"{path}, line {number} is no JSON ({e}): remove that line") from e
    return rows


def _row(arm: str, seed: int, budget: dict, tests: Tests, found: dict[str, np.ndarray], **more) -> dict:
    items = {name: "".join(str(int(x)) for x in a) for name, a in found.items()}
    return {"arm": arm, "seed": seed} | budget | more | {"scores": summary(found, tests.pairs.pattern), "items": items}


def kept(arm: Arm) -> bool:
    """Whether what an arm needs is among the kept weights."""
    needed = {arm.teacher, models.PROJECTION if arm.projection == KEPT else ""} - {"", RANDOM}
    return all((models.WEIGHTS / name).exists() for name in needed)


def experiment(out: Path, names: Sequence[str], seeds: int, budget: dict[str, int]) -> list[dict]:
    """Runs what is missing; returns all rows of results.jsonl.

    Args:
      out: the folder.
      names: of arms; "untuned" is added.
      seeds: per arm, from 0.
      budget: {"steps", "batch_size", "pairs"}.

    Raises:
      UserError: an arm is not known, its teacher is not kept, the batch cannot be divided, or the folder has runs of
        another budget.
    """
    names = list(dict.fromkeys(["untuned", *names]))
    if unknown := [n for n in names if n not in ARMS]:
        raise UserError(f"--arms has {listing(unknown)}: use some of {listing(list(ARMS))}")
    if missing := [n for n in names if not kept(ARMS[n])]:
        raise UserError(
            f"--arms has {listing(missing)}, which need more than is in {models.WEIGHTS}: make it with python -m "
            "diva_jax.world.pretrain and copy it there"
        )
    for n in names[1:]:
        arm_config(ARMS[n], 0, budget["steps"], budget["batch_size"], out)
    out.mkdir(parents=True, exist_ok=True)
    rows = read(out / RESULTS)
    if any(row[k] != v for row in rows for k, v in budget.items()):
        raise UserError(f"--out={out} has runs of other --steps, --batch_size or --pairs: give another folder")
    (out / RESULTS).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    there = {(row["arm"], row["seed"]) for row in rows}
    wanted = [(n, s) for n in names for s in range(seeds if n != "untuned" else 1) if (n, s) not in there]
    if not wanted:
        return rows
    tests, bar = Tests.make(count=budget["pairs"]), log.progress("experiment", len(wanted), "runs", every=0)
    judge, name, tuner = Judge(tests), "", None
    for arm, seed in wanted:
        say(f"{arm}, seed {seed}")
        if arm == "untuned":
            row = _row(arm, seed, budget, tests, judge({}), drift=0.0)
        else:
            if arm != name:
                name, tuner = arm, Tuner(ARMS[arm], budget["steps"], budget["batch_size"], out)
            towers, loss = tuner.run(seed)
            row = _row(arm, seed, budget, tests, judge(towers), loss=loss, drift=judge.drift(towers))
        rows.append(row)
        with open(out / RESULTS, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        say("  " + ", ".join(f"{m} {row['scores'][m]:.1f}" for m in comparison.METRICS))
        bar.update()
    bar.close()
    return rows


def _main() -> None:
    given = flags.FLAGS
    if not given.out:
        raise UserError("--out is missing: give a folder, e.g. --out=runs/experiment")
    out = Path(given.out)
    compiler.use_cache(compiler.AUTO, paths.folder(given.out, "--out"))
    budget = {"steps": given.steps, "batch_size": given.batch_size, "pairs": given.pairs}
    arms = given.arms or [name for name, arm in ARMS.items() if kept(arm)]
    rows = experiment(out, arms, given.seeds, budget)
    compared = comparison.compare(rows)
    text = comparison.markdown(compared)
    (out / "table.md").write_text(text, "utf-8")
    comparison.write_pareto(compared, out / "pareto.png")
    say(text)


if __name__ == "__main__":
    from absl import flags

    from diva_jax.common import cli

    # Here and not above: other modules of this package define --out as well.
    flags.DEFINE_string("out", None, "Folder for results.jsonl, table.md and pareto.png.")
    flags.DEFINE_list("arms", [], "Names of arms, see arms.py; default all.")
    flags.DEFINE_integer("seeds", 5, "Per arm.", 1)
    flags.DEFINE_integer("steps", 200, "Optimizer steps of a run, all stages together.", 3)
    flags.DEFINE_integer("batch_size", 40, "Passes through the U-Net per step.", 2)
    flags.DEFINE_integer("pairs", PAIRS, "Pairs per fact of the test.", 1)
    cli.run(_main)
