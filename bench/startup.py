"""Measures the start of a run on this machine: seconds from the command to the first step, cold and warm.

    python bench/startup.py --config=configs/world.py --pairs=3
    python bench/startup.py --before=OTHER_CHECKOUT --pairs=7
    python bench/startup.py --aot=bench/tpu/vitl14-v5e-16.json

Each measurement is a process `python -m diva_jax.main`, which is ended when it has printed the loss of its first step.
Cold runs have an empty folder of compiled programs, warm ones that of the first cold run; the two sides alternate. The
phases end where the run says so in its output. CPU seconds are those of all threads of the process (Linux only), which
other load on the machine affects less than wall time.

With --before, only the imports of a run are measured, those of another checkout and of this one alternately. At full
size, on a TPU, most of the start is the compiler's work: --aot reads its seconds from files that `python -m
diva_jax.aot --json=FILE` has written, and measures nothing.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

ROOT = Path(__file__).resolve().parents[1]
_CONFIG = flags.DEFINE_string("config", str(ROOT / "configs/world.py"), "The config, as for diva_jax.main.")
_PAIRS = flags.DEFINE_integer("pairs", 3, "Number of cold and of warm runs.", 1)
_SET = flags.DEFINE_multi_string("set", [], "FIELD=VALUE of the config; may be repeated.")
_BEFORE = flags.DEFINE_string("before", None, "Instead: a checkout whose imports are compared with those of this one.")
_AOT = flags.DEFINE_multi_string("aot", [], "Instead: a file that diva_jax.aot --json has written; may be repeated.")

# Phase -> the beginning of the line of the run's output with which it ends.
PHASES = {
    "imports, config, data": "writes to ",
    "weights, state": "weights loaded",
    "trace, compile": "compiled in",
    "first step": "step 1/",
}
_IMPORTS = "import diva_jax.main, diva_jax.training.loop"


def cpu_seconds(pid: int) -> float:
    """CPU time of a process that still exists, of all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _environment(root: Path = ROOT) -> dict[str, str]:
    """Of the processes: the package in `root` is found, and Python keeps its bytecode, as it does by default."""
    found = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    for name in ("PYTHONDONTWRITEBYTECODE", "JAX_COMPILATION_CACHE_DIR"):
        found.pop(name, None)
    return found


def start_of_run(config: str, fields: Sequence[str], compiled: str, workdir: str) -> dict[str, tuple[float, float]]:
    """Starts a run and ends it after its first step.

    Args:
      config: as for diva_jax.main.
      fields: FIELD=VALUE of the config.
      compiled: the folder of compiled programs.
      workdir: of the run; new.

    Returns:
      Phase -> (wall, CPU) [s].

    Raises:
      RuntimeError: the run ended, or a phase is missing in its output.
    """
    given = [f"compile_cache={compiled}", "log.every=1", *fields]
    line = [sys.executable, "-m", "diva_jax.main", f"--config={config}", f"--workdir={workdir}"]
    line += [f"--config.{field}" for field in given]
    seen, waiting = {}, list(PHASES.items())
    before = time.perf_counter(), 0.0
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(line, env=_environment(), stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            for said in process.stdout:
                if not said.startswith(waiting[0][1]):
                    continue
                now = time.perf_counter(), cpu_seconds(process.pid)
                seen[waiting.pop(0)[0]] = (now[0] - before[0], now[1] - before[1])
                before = now
                if not waiting:
                    return seen
            process.wait()
            errors.seek(0)
            raise RuntimeError(f"the run ended before {waiting[0][1]!r}: {errors.read()[-2000:]}")
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def imports(root: Path = ROOT) -> tuple[float, float]:
    """(wall, CPU) seconds of a process that imports what a run needs from the checkout `root`, and ends."""
    before, used = time.perf_counter(), os.times()
    subprocess.run([sys.executable, "-c", _IMPORTS], env=_environment(root), cwd=root, check=True)
    after = os.times()
    cpu = after.children_user + after.children_system - used.children_user - used.children_system
    return time.perf_counter() - before, cpu


def table(rows: dict[str, dict[str, Sequence[tuple[float, float]]]]) -> str:
    """Medians: phase -> side -> (wall, CPU) of each run, as a table with one line per phase."""
    sides = list(next(iter(rows.values())))
    heads = [f"{side} {unit} [s]" for side in sides for unit in ("wall", "CPU")]
    lines = [f"{'phase':<24}" + "".join(f"{head:>15}" for head in heads)]
    for phase, found in rows.items():
        middle = [statistics.median(run[i] for run in found[side]) for side in sides for i in range(2)]
        lines.append(f"{phase:<24}" + "".join(f"{value:>15.2f}" for value in middle))
    return "\n".join(lines)


def measure(config: str, pairs: int, fields: Sequence[str]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Runs all pairs; returns phase -> "cold" or "warm" -> (wall, CPU) of each run, the sum of the phases last."""
    names = [*PHASES, "all", "imports alone"]
    rows = {phase: {"cold": [], "warm": []} for phase in names}
    with tempfile.TemporaryDirectory() as tmp:
        imports()  # Whatever is not in the page cache yet.
        for pair in range(pairs):
            for side in ("cold", "warm") if pair % 2 == 0 else ("warm", "cold"):
                compiled = Path(tmp, f"compiled_{pair if side == 'cold' else 0}")
                if side == "cold":
                    assert not compiled.exists()
                found = start_of_run(config, fields, str(compiled), f"{tmp}/{side}_{pair}")
                found["all"] = tuple(map(sum, zip(*found.values(), strict=True)))
                found["imports alone"] = imports()
                for phase, value in found.items():
                    rows[phase][side].append(value)
                wall, cpu = found["all"]
                print(f"{side}: first step after {wall:.2f} s, {cpu:.2f} s of CPU", flush=True)
    return rows


def compare_imports(before: Path, pairs: int) -> None:
    """Prints the CPU seconds of the imports of another checkout and of this one, pair by pair, and their ratio."""
    sides, ratios = {"before": before, "this": ROOT}, []
    for root in sides.values():  # Bytecode, and the page cache.
        imports(root)
    for pair in range(pairs):
        order = list(sides) if pair % 2 == 0 else list(sides)[::-1]
        cpu = {side: imports(sides[side])[1] for side in order}
        ratios.append(cpu["this"] / cpu["before"])
        print(f"before {cpu['before']:.2f} s of CPU  this {cpu['this']:.2f}  ratio {ratios[-1]:.2f}", flush=True)
    print(f"this / before, median of the pairs: {statistics.median(ratios):.2f}")


def of_aot(files: Sequence[str]) -> str:
    """One line per file of diva_jax.aot: seconds to trace and to compile the step."""
    lines = [f"{'file':<40}{'topology':>12}{'batch':>8}{'trace [s]':>12}{'compile [s]':>14}"]
    for file in files:
        row = json.loads(Path(file).read_text())
        took = row["seconds"]
        lines.append(
            f"{Path(file).stem:<40}{row['topology']:>12}{row['batch_size']:>8}"
            f"{took['trace']:>12.0f}{took['compile']:>14.0f}"
        )
    return "\n".join(lines)


def main(_) -> None:
    if _AOT.value:
        print(of_aot(_AOT.value))
        return
    if _BEFORE.value:
        compare_imports(Path(_BEFORE.value).resolve(), _PAIRS.value)
        return
    rows = measure(_CONFIG.value, _PAIRS.value, _SET.value)
    print(table(rows))
    ratios = [cold[0] / warm[0] for cold, warm in zip(*(rows["all"][s] for s in ("cold", "warm")), strict=True)]
    print(f"cold / warm, wall, median of the pairs: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    app.run(main)
