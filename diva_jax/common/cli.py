"""What every command shares: flags, `--config`, and how errors are reported."""

import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from diva_jax.common.errors import RunError, UserError, printable

_LINGER = 10.0  # Seconds for threads to end after a command has; one of them may wait for a disk that is gone.
_INTERRUPTED = 130  # Exit code after SIGINT, as shells have it.


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


def _end_within(seconds: float, code: int, message: str = "") -> None:
    """Ends the process after some seconds, whatever its threads wait for, if it has not ended by then."""

    def end():
        if message:
            print(message, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def _on_sigint(*_) -> None:
    """Raises KeyboardInterrupt; ends the process a little later where that was lost, as in a callback of jax."""
    _end_within(_LINGER, _INTERRUPTED, "interrupted")
    raise KeyboardInterrupt


def _write_trace() -> str:
    """Writes the trace of the present exception to a new file in the folder for temporary files; returns its name."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="diva_jax_", suffix=".log", delete=False, encoding="utf-8") as f:
            f.write(f"{' '.join(sys.argv)}\n\n{traceback.format_exc()}")
        return f"the full trace is in {f.name}"
    except OSError as e:
        return f"the full trace could not be written ({e})"


def run(main: Callable[..., None], arguments: Sequence[str] = ()) -> None:
    """Runs a command: flags parsed, every error reported as one line.

    Exit codes: 2 for `UserError`; 1 for `RunError` and for unexpected exceptions, whose trace is written to
    a file; 130 after SIGINT.

    Args:
      main: called with the values of `arguments`.
      arguments: names of what the command takes besides flags, in order; all are required.
    """

    def report(message: str, code: int):
        print(printable(" ".join(message.split())), file=sys.stderr, flush=True)
        _end_within(_LINGER, code)
        sys.exit(code)

    def guarded(argv):
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax and grain log many lines for every save.
        main(*argv[1:])
        _end_within(_LINGER, 0)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _on_sigint)
    try:
        app.run(guarded, flags_parser=lambda argv: _parse(argv, arguments))
    except UserError as e:
        report(f"error: {e}", 2)
    except RunError as e:
        report(f"error: {e}", 1)
    except KeyboardInterrupt:
        report("interrupted", _INTERRUPTED)
    except Exception as e:
        said = " ".join(f"{type(e).__name__}: {e}".split())[:300]
        report(f"error: unexpected ({said}): {_write_trace()}, please report it", 1)
