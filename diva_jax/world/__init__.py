"""A small world of drawn images whose facts are known, in which the method can be tested on two CPU cores.

`scenes` has the facts, `drawing` the images, `captions` the texts, `records` both as a source of training data.
`pretrain` makes a CLIP that is blind to a fact which captions seldom mention, and a generator that is not; the results
are kept in `weights`, and `criteria` says what they know. `experiment` tunes the CLIP with the `arms`, measures the
`endpoints` with `blindness`, and compares; `why` measures what an arm's gradient holds. docs/DOES_IT_WORK.md has the
results.
"""

from pathlib import Path

from diva_jax.common import paths
from diva_jax.common.errors import UserError


def folder(out: str | None, example: str) -> Path:
    """The folder that a command has as --out; a UserError where it is missing, in a bucket, or cannot be written."""
    if not out or paths.is_remote(out):
        raise UserError(f"--out={out or ''} is no folder on this machine: give one, e.g. --out={example}")
    found = paths.folder(out, "--out")
    paths.check_writable(found, "--out")
    return Path(found)
