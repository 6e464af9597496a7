"""Compares the methods in the small world: python -m diva_jax.world.experiment --out=runs/experiment [--arms=NAME,NAME]

Tunes the kept CLIP with each arm of `arms.ARMS` and several seeds, runs the tests of `blindness`, and writes one line
per run to OUT/results.jsonl, then the comparison (table.md, scores.json, pareto.png). The same command goes on with the
runs that are not there yet. With --search, seeds and tests are others than those that are reported, and --arms may
change fields: --arms=labels:optim.lr=3e-4. docs/DOES_IT_WORK.md has the results.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from diva_jax import world
from diva_jax.common.errors import UserError
from diva_jax.common.log import progress, say
from diva_jax.training import compiler
from diva_jax.world import arms, blindness, comparison
from diva_jax.world.endpoints import DRIFT, ENDPOINTS
from diva_jax.world.tuning import Examiner, Tuner

RESULTS = "results.jsonl"


def read(path: Path) -> list[dict]:
    """The runs of results.jsonl; a last line that was cut off is left out. A UserError where another line is broken."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as e:
            if number < len(lines):
                raise UserError(f"{path}, line {number} is no JSON ({e}): remove that line") from e
    return rows


def row(arm: str, seed: int, after: int, about: dict, found: dict[str, np.ndarray], **more) -> dict:
    """One line of results.jsonl: a run `after` so many images; `about` is what all lines of a folder share."""
    items = {name: "".join(str(int(x)) for x in a) for name, a in found.items()}
    return {"arm": arm, "seed": seed, "after": after} | about | more | {"items": items}


def experiment(
    out: Path, names: Sequence[str], seeds: Sequence[int], budget: arms.Budget, pairs: int, tests: int = blindness.SEED
) -> list[dict]:
    """Runs what is missing, seed by seed; returns all rows of results.jsonl.

    Args:
      out: the folder.
      names: of arms, see `arms.find`; "untuned" is added.
      seeds: of each arm.
      budget: of each run.
      pairs: per fact of the tests.
      tests: their seed.

    Raises:
      UserError: an arm is not known, or the folder has runs of another budget or other tests.
    """
    names = list(dict.fromkeys(["untuned", *names]))
    found = {name: arms.find(name) for name in names}
    for name in names[1:]:
        arms.arm_config(found[name], 0, budget, out)
    about = budget._asdict() | {"pairs": pairs, "tests": tests}
    out.mkdir(parents=True, exist_ok=True)
    rows = read(out / RESULTS)
    if any(r[k] != v for r in rows for k, v in about.items()):
        raise UserError(f"--out={out} has runs of another budget or of other tests: give another folder")
    there = {(r["arm"], r["seed"]) for r in rows if r["after"] == budget.images or r["arm"] == "untuned"}
    rows = [r for r in rows if (r["arm"], r["seed"]) in there]
    (out / RESULTS).write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    wanted = [("untuned", 0), *((n, s) for s in seeds for n in names[1:])]
    wanted = [run for run in wanted if run not in there]
    if not wanted:
        return rows
    examiner, tuners = Examiner(blindness.Tests.make(tests, pairs)), {}
    with progress("experiment", len(wanted), "runs", every=0) as bar:
        for arm, seed in wanted:
            say(f"{arm}, seed {seed}")
            if arm == "untuned":
                measured = [(0, {}, 0.0)]
            else:
                if arm not in tuners:
                    tuners[arm] = Tuner(found[arm], budget, out)
                measured = tuners[arm].run(seed)
            for after, towers, loss in measured:
                drift = examiner.drift(towers)
                rows.append(row(arm, seed, after, about, examiner(towers), loss=loss, **{DRIFT: drift}))
                with open(out / RESULTS, "a", encoding="utf-8") as f:
                    f.write(json.dumps(rows[-1]) + "\n")
                scores = {e.title: e.score(comparison.found(rows[-1])) for e in ENDPOINTS.values()}
                shown = ", ".join(f"{title} {score:.1f}" for title, score in scores.items())
                say(f"  after {after} images: {shown}, drift {drift:.4f}")
            bar.update()
    return rows


def _main() -> None:
    given = flags.FLAGS
    out = world.folder(given.out, "runs/experiment")
    compiler.use_cache(compiler.AUTO, out)
    first, tests = (arms.SEARCH, blindness.SEARCH_SEED) if given.search else (0, blindness.SEED)
    seeds = range(first, first + given.seeds)
    names = given.arms or [name for name in arms.ARMS if name != "untuned"]
    budget = arms.Budget(given.images, given.batch_size, min(arms.Budget().early, given.images))
    rows = experiment(out, names, seeds, budget, given.pairs, tests)
    compared = comparison.compare(rows)
    scores = {"early": comparison.scores(comparison.compare(rows, early=True)), "end": comparison.scores(compared)}
    text = comparison.markdown(compared)
    (out / "table.md").write_text(text, "utf-8")
    (out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", "utf-8")
    comparison.write_pareto(compared, out / "pareto.png")
    say(text)


if __name__ == "__main__":
    flags.DEFINE_list("arms", [], "Names of arms, see arms.py; default all.")
    flags.DEFINE_integer("seeds", 5, "Per arm.", 1)
    flags.DEFINE_integer("images", arms.Budget().images, "Of a run, counted as often as they are seen.", 8)
    flags.DEFINE_integer("batch_size", arms.Budget().batch_size, "Images per step.", 2)
    flags.DEFINE_integer("pairs", blindness.PAIRS, "Pairs per fact of the tests.", 1)
    flags.DEFINE_bool("search", False, "Use the seeds and tests of the search of rates.")
    world.run(_main, "Folder for results.jsonl, table.md and pareto.png.")
