"""Errors that are the user's to mend, and how every command reports them."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags


class UserError(Exception):
    """Bad input. The message is one sentence that says what is wrong and what to do; exit code 2."""


class RunError(Exception):
    """The run itself failed (a loss that is not finite, too many broken images); exit code 1."""


def listing(names: Sequence[str], limit: int = 20) -> str:
    """`a, b, c`, cut with a count past `limit` names."""
    names = [str(n) for n in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses flags; any complaint of absl or ml_collections becomes a UserError."""
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as e:
        raise UserError(" ".join(str(e).split()) + " (see --help)") from e
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: every option is a flag, see --help")
    return rest


def run(main: Callable[[], None]) -> None:
    """Runs a command: flags parsed, `UserError` printed as one line with exit code 2, `RunError` 1."""

    def report(e: Exception, code: int):
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr, flush=True)
        sys.exit(code)

    def guarded(_):
        try:
            main()
        except UserError as e:
            report(e, 2)
        except RunError as e:
            report(e, 1)

    try:
        app.run(guarded, flags_parser=_parse)
    except UserError as e:
        report(e, 2)
