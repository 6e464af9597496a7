"""How far is every comparison of floats from its bound?  python tests/support/margins.py [PYTEST ARGUMENTS]

Runs the tests that compare floats under several instruction sets of XLA, PyTorch, oneDNN and OpenBLAS, as a plugin of
pytest that records error / bound of every `helpers.within`, `helpers.close`, `np.testing.assert_allclose` and
`pytest.approx`. Prints the worst ratio of each file, and each test that is above a third; the exit code is then 1.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

# Instruction set -> the variables that limit XLA, PyTorch, oneDNN and OpenBLAS to it.
_NAMES = ("XLA_FLAGS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "OPENBLAS_CORETYPE")
_LIMITS = {"default": (), "AVX2": ("--xla_cpu_max_isa=AVX2", "avx2", "AVX2", "Haswell")}
_LIMITS["SSE4.2"] = ("--xla_cpu_max_isa=SSE4_2", "default", "SSE41", "Nehalem")
SETTINGS = {name: dict(zip(_NAMES, limits, strict=False)) for name, limits in _LIMITS.items()}
_COMPARISONS = re.compile(r"\b(assert_allclose|assert_trees_all_close|approx|(?<!\.)close|within|compare_steps)\(")
LARGEST_RATIO = 1 / 3
_FILE = os.environ.get("MARGINS", "")


def record(error: float, bound: float, what="") -> None:
    """Notes a comparison of the running test in the file $MARGINS; without it, nothing."""
    if _FILE:
        test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
        ratio = 0.0 if error == 0 else float(np.float64(error) / bound)
        with open(_FILE, "a") as f:
            f.write(json.dumps([test, ratio, float(error), float(bound), str(what)]) + "\n")


def _worst(error, bound, what) -> None:
    """Records the worst of many entries, each with its own bound."""
    error, bound = np.broadcast_arrays(np.asarray(error, np.float64), np.asarray(bound, np.float64))
    if error.size:
        with np.errstate(divide="ignore", invalid="ignore"):
            at = np.argmax(np.where(error == 0, 0, error / bound))
        record(error.flat[at], bound.flat[at], what)


def pytest_configure(config) -> None:
    """Lets numpy's and pytest's comparisons record too."""
    import pytest

    scalar = type(pytest.approx(1.0))
    allclose, equal = np.testing.assert_allclose, scalar.__eq__

    def assert_allclose(actual, desired, rtol=1e-7, atol=0, *args, **kwargs):
        allclose(actual, desired, rtol, atol, *args, **kwargs)
        want = np.asarray(desired, np.float64)
        _worst(np.abs(np.asarray(actual, np.float64) - want), atol + rtol * np.abs(want), "assert_allclose")

    def approx(self, actual) -> bool:
        found = equal(self, actual)
        if found and isinstance(self.expected, float | np.floating) and np.isfinite(self.expected):
            _worst(abs(actual - self.expected), self.tolerance, "approx")
        return found

    np.testing.assert_allclose, scalar.__eq__ = assert_allclose, approx


def main(arguments: list[str]) -> int:
    files = sorted(Path(__file__).parents[1].rglob("test_*.py"))
    paths = [] if any(a.startswith("tests") for a in arguments) else files
    paths = [str(p) for p in paths if _COMPARISONS.search(p.read_text())]
    worst: dict[str, tuple] = {}
    failed = []
    for setting, env in SETTINGS.items():
        with tempfile.NamedTemporaryFile() as file:
            command = [sys.executable, "-m", "pytest", "-q", "-p", "margins", *arguments, *paths]
            path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
            print(f"{setting}:", flush=True)
            ended = subprocess.run(command, env=os.environ | env | {"MARGINS": file.name, "PYTHONPATH": path})
            failed += [setting] * (ended.returncode != 0)
            for line in Path(file.name).read_text().splitlines():
                test, *rest = json.loads(line)
                worst[test] = max(worst.get(test, (-1.0,)), (*rest, setting))
    print()
    for file, of_file in itertools.groupby(sorted(worst), lambda test: test.partition("::")[0]):
        print(f"{max(worst[test][0] for test in of_file):5.2f} of the bound at most  {file}")
    near = sorted(((*w, t) for t, w in worst.items() if not w[0] <= LARGEST_RATIO), reverse=True)
    print(f"\n{len(worst)} tests compare floats; {len(near)} have a comparison above a third of its bound")
    for ratio, error, bound, what, setting, test in near:
        print(f"{ratio:5.2f} of its bound: {error:.1e} of {bound:.1e}  {test}  {what}  ({setting})")
    if failed:
        print(f"tests failed under: {', '.join(failed)}")
    return 1 if near or failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
