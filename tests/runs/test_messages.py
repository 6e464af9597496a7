"""What commands print for help, and for input that is not good: one line that says what to do."""

import json
import re
import sys
from pathlib import Path

import commands
import pytest
import trees
from places import ROOT

# Name -> [arguments, of `main` where they do not begin with a command; what the line must contain, or texts of it all].
REFUSED, SHOWN = json.loads(Path(__file__).with_name("messages.json").read_text()).values()
# Command of bench/ -> what it prints.
SCRIPTS = json.loads(Path(__file__).with_name("bench.json").read_text())


@pytest.fixture(scope="module")
def ended(home):
    files = dict.fromkeys(("a.zip", "a.tar.gz", "photo.jpg"), "nothing")
    trees.change(home, files | {"broken.py": "def get_config():\n    return 1 + 'a'\n"})
    cases = {name: arguments for name, (arguments, _) in (REFUSED | SHOWN).items()}
    found = [commands.run(*(["main", *a] if a[0].startswith("--") else a), cwd=home) for a in cases.values()]
    assert {p.name for p in home.iterdir()} == {*files, "broken.py"}
    return dict(zip(cases, found, strict=True))


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(ended, case):
    code, out, err = ended[case]
    assert code == 2 and len(err.splitlines()) == 1 and err.startswith("error: "), (out, err)
    assert REFUSED[case][1] in err and "Traceback" not in err and "Traceback" not in out


@pytest.mark.parametrize("case", SHOWN)
def test_shown(ended, case):
    code, out, err = ended[case]
    assert code == 0 and not err and all(text in out for text in SHOWN[case][1]), (out, err)
    assert "absl" not in out and "--pdb" not in out
    flags = re.findall(r"^  (--[\w.]+)", out, re.M)
    assert len(flags) == len(set(flags))


def test_the_help_of_a_script():
    assert "usage: roundtrip.py [" in commands.succeed(ROOT / "bench/roundtrip.py", "--help", path=[ROOT / "bench"])


def test_every_config_of_the_repository_is_found_by_name():
    found, there = ({f.name for f in (ROOT / folder).glob("*.py")} for folder in ("diva_jax/configs", "configs"))
    assert found == there


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_of_bench_runs(tmp_path, script):
    printed = commands.output(commands.launch(sys.executable, *f"bench/{script}".format(tmp=tmp_path).split()))
    assert not [said for said in SCRIPTS[script] if said not in printed], printed
