"""What every command shares: flags, `--config`, and how errors are reported."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from diva_jax.common.errors import RunError, UserError


def config_of(flag):
    """The config that a `--config` flag (of `config_flags.DEFINE_config_file`) names.

    Raises:
      UserError: the flag is missing, or its file cannot be loaded.
    """
    if flag.value is None:
        raise UserError("--config is missing: give a config file, e.g. --config=configs/vitl14.py")
    try:
        flag.value.to_dict()
    except OSError as e:  # ml_collections keeps a failure to load until the config is looked at.
        raise UserError(f"--config cannot be loaded: {str(e).split('earlier failure to load: ')[-1]}") from e
    return flag.value


def _parse(argv: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Parses flags; any complaint of absl or ml_collections becomes a UserError, as do missing `arguments`."""
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as e:
        message = e.args[0] if isinstance(e, KeyError) and e.args else e  # str(KeyError) is its argument's repr.
        raise UserError(f"{message} (see --help)") from e
    known = len(arguments) + 1
    if len(rest) > known:
        raise UserError(f"unexpected argument {rest[known]!r}: every other option is a flag, see --help")
    if len(rest) < known:
        raise UserError(f"{arguments[len(rest) - 1]} is missing: give it as an argument, see --help")
    return rest


def run(main: Callable[..., None], arguments: Sequence[str] = ()) -> None:
    """Runs a command: flags parsed, `UserError` printed as one line with exit code 2, `RunError` 1.

    Args:
      main: called with the values of `arguments`.
      arguments: names of what the command takes besides flags, in order; all are required.
    """

    def report(e: Exception, code: int):
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr, flush=True)
        sys.exit(code)

    def guarded(argv):
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax and grain tell a page for every save.
        try:
            main(*argv[1:])
        except UserError as e:
            report(e, 2)
        except RunError as e:
            report(e, 1)

    try:
        app.run(guarded, flags_parser=lambda argv: _parse(argv, arguments))
    except UserError as e:
        report(e, 2)
