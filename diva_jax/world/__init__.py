"""A small world of drawn images whose facts are known, in which the method can be tested on two CPU cores.

`scenes` has the facts, `drawing` the images, `captions` the texts, `records` both as a source of training data.
`pretrain` makes a CLIP that is blind to a fact which captions seldom mention, and a generator that is not; the results
are kept in `weights`, and `criteria` says what they know. `experiment` tunes the CLIP with the `arms`, measures the
`endpoints` with `blindness`, and compares; `why` measures what an arm's gradient holds. docs/DOES_IT_WORK.md has the
results.
"""

from collections.abc import Callable
from pathlib import Path

from absl import flags

from diva_jax.common import cli, paths
from diva_jax.common.errors import UserError

flags.disclaim_key_flags()


def folder(out: str | None, example: str) -> Path:
    """The folder that a command has as --out; a UserError where it is missing, in a bucket, or cannot be written."""
    if not out or paths.is_remote(out):
        raise UserError(f"--out={out or ''} is no folder on this machine: give one, e.g. --out={example}")
    found = paths.folder(out, "--out")
    paths.check_writable(found, "--out")
    return Path(found)


def run(main: Callable[[], None], out: str) -> None:
    """Runs a command of this package, which has the flag --out, described by `out`, beside its own. Flags are defined
    where a module is run, not where it is imported: several modules have those of one name."""
    flags.DEFINE_string("out", None, out)
    cli.run(main)
