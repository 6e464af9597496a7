"""How far is every comparison of floats from its bound?  python tests/support/margins.py [PYTEST ARGUMENTS]

Runs the tests that compare floats under several instruction sets of XLA, PyTorch, oneDNN and OpenBLAS, as a plugin of
pytest that records error / bound of every `helpers.within`, `helpers.close`, `np.testing.assert_allclose` and
`pytest.approx`. Prints the worst ratio of each file, and each test that is above a third; the exit code is then 1.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

SETTINGS = {
    "default": {},
    "AVX2": {
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
    },
    "SSE4.2": {
        "XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2",
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "OPENBLAS_CORETYPE": "Nehalem",
    },
}
_COMPARISONS = re.compile(r"\b(assert_allclose|approx|(?<!\.)close|within|check_trained)\(")
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


def numerical_tests() -> list[str]:
    """Returns the test files that compare floats in a way that is recorded."""
    root = Path(__file__).parents[1]
    return [str(p) for p in sorted(root.rglob("test_*.py")) if _COMPARISONS.search(p.read_text())]


def main(arguments: list[str]) -> int:
    paths = () if any(a.startswith("tests") for a in arguments) else numerical_tests()
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
    files: dict[str, float] = {}
    for test, (ratio, *_) in worst.items():
        file = test.partition("::")[0]
        files[file] = max(files.get(file, 0.0), ratio)
    print()
    for file, ratio in sorted(files.items()):
        print(f"{ratio:5.2f} of the bound at most  {file}")
    near = sorted(((*w, t) for t, w in worst.items() if not w[0] <= LARGEST_RATIO), reverse=True)
    print(f"\n{len(worst)} tests compare floats; {len(near)} have a comparison above a third of its bound")
    for ratio, error, bound, what, setting, test in near:
        print(f"{ratio:5.2f} of its bound: {error:.1e} of {bound:.1e}  {test}  {what}  ({setting})")
    if failed:
        print(f"tests failed under: {', '.join(failed)}")
    return 1 if near or failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
