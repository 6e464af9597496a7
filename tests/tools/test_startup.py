"""bench/startup.py at toy size: the phases of a cold and a warm start, and the seconds of a report of aot."""

import json
import re
import sys

import commands
import pytest
from places import ROOT, SUPPORT

SCRIPT = ROOT / "bench" / "startup.py"


def printed(*flags) -> str:
    return commands.output(commands.launch(sys.executable, SCRIPT, *flags))


@pytest.mark.slow
def test_a_pair_of_cold_and_warm(files):
    """The warm run reads the compiled step of the cold one."""
    out = printed(f"--config={SUPPORT}/e2e_config.py:{files}", "--pairs=1", "--set=diva.draws=1", "--set=accum=1")
    found = [line for line in out.splitlines() if re.fullmatch(r".{24}(\s+\d+\.\d\d){4}", line)]
    rows = {line[:24].strip(): [float(x) for x in line[24:].split()] for line in found}
    phases = ["imports, config, data", "weights, state", "trace, compile", "first step"]
    assert list(rows) == [*phases, "all", "imports alone"], out
    for i, whole in enumerate(rows["all"]):
        assert abs(sum(rows[p][i] for p in phases) - whole) < 0.05, out
    cold, warm = rows["trace, compile"][1], rows["trace, compile"][3]
    assert 0 < warm < cold, out
    assert re.search(r"cold / warm, wall, median of the pairs: \d+\.\d\d", out)


def test_seconds_of_aot():
    file = ROOT / "bench" / "tpu" / "vitl14-v5e-16.json"
    seconds = json.loads(file.read_text())["seconds"]
    line = printed(f"--aot={file}").splitlines()[-1].split()
    assert [line[0], *line[3:]] == ["vitl14-v5e-16", f"{seconds['trace']:.0f}", f"{seconds['compile']:.0f}"]
