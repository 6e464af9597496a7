"""What the training command prints for help, and for input that is not good: one line that says what to do."""

import re

import commands
import pytest
from places import ROOT

TINY = ("--config=tiny", "--workdir=run")
# Arguments -> what the line must contain.
REFUSED = {
    "a misspelt field": ((*TINY, "--config.optim.lrr=3"), "no field optim.lrr; did you mean optim.lr?"),
    "a text for a number": ((*TINY, "--config.optim.lr=fast"), "config.optim.lr"),
    "an unknown section": (
        (*TINY, "--config.nonsense.a=3"),
        "the config has no field nonsense.a: --config=FILE --help lists",
    ),
    "one number for a pair": ((*TINY, "--config.data.crop.scale=0.5"), "config.data.crop.scale=(0.5,) must be two"),
    "no demo data": (TINY, "config.data.path='data/tiny/photos' does not exist: python -m diva_jax.demo"),
    "no demo weights": ((*TINY, "--config.data.path=photo.jpg"), "clip' does not exist: python -m diva_jax.demo"),
    "another kind of file": ((*TINY, "--config.data.path=a.zip"), "config.data.path='a.zip' is no kind of data"),
    "a compressed archive": ((*TINY, "--config.data.path=a.tar.gz"), "is compressed: unpack it to .tar"),
    "a table without images": ((*TINY, "--config.data.path=t.csv"), "t.csv has no column image"),
    "a workdir that is a file": (("--config=tiny", "--workdir=a.zip"), "--workdir=a.zip cannot be a folder"),
    "a config that is not there": (("--config=vitl15", "--workdir=run"), "the name of a config: comclip_vitl14, "),
    "a config file that is not there": (("--config=nothing.py", "--workdir=run"), "nothing.py"),
    "an unknown model": (("--config=custom:ViT-B-17", "--workdir=run"), "names are ViT-B-32, "),
    "a name with a typing error in Python": (
        ("--config=broken.py", "--workdir=run"),
        "error: broken.py does not make a config (TypeError: ",
    ),
    "wandb is not installed": ((*TINY, "--config.log.wandb=p"), "pip install -e '.[wandb]'"),
    "no task": ((*TINY, "--config.eval.data=drift=a,nothing=b", "--config.eval.every=1"), "the task nothing"),
}
SHOWN = {
    "help": (("--help",), ("usage: python -m diva_jax.main", "--workdir", "--init_from", "JAX_COORDINATOR_ADDRESS")),
    "fields": (
        ("--config", "tiny", "--config.steps=7", "--config.eval.data=drift=a,mmvp=b", "--help"),
        (
            "--config.steps=7\n      The optimizer steps",
            "--config.eval.data=('drift=a', 'mmvp=b')",
            "--config.diva.draws=2",
        ),
    ),
    "version": (("--version",), ("diva_jax 0.1.0, jax ",)),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The name of a case -> its (exit code, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("empty")
    for name in ("a.zip", "a.tar.gz", "photo.jpg"):
        (folder / name).write_text("nothing")
    (folder / "t.csv").write_text("a,b\n1,2\n")
    (folder / "broken.py").write_text("def get_config():\n    return 1 + 'a'\n")
    cases = {name: arguments for name, (arguments, _) in (REFUSED | SHOWN).items()}
    found = [commands.run("main", *arguments, cwd=folder) for arguments in cases.values()]
    assert sorted(p.name for p in folder.iterdir()) == ["a.tar.gz", "a.zip", "broken.py", "photo.jpg", "t.csv"]
    return dict(zip(cases, found, strict=True))


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(ended, case):
    code, out, err = ended[case]
    assert code == 2 and len(err.splitlines()) == 1 and err.startswith("error: "), (out, err)
    assert REFUSED[case][1] in err and "Traceback" not in err and "Traceback" not in out


@pytest.mark.parametrize("case", SHOWN)
def test_shown(ended, case):
    code, out, err = ended[case]
    assert code == 0 and not err
    for text in SHOWN[case][1]:
        assert text in out
    assert "absl" not in out and "--pdb" not in out
    flags = re.findall(r"^  (--[\w.]+)", out, re.M)
    assert len(flags) == len(set(flags))


def test_every_config_of_the_repository_is_found_by_name():
    assert {f.name for f in (ROOT / "diva_jax/configs").glob("*.py")} == {
        f.name for f in (ROOT / "configs").glob("*.py")
    }
