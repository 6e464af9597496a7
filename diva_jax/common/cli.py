"""What every command shares: flags, `--config`, and how errors are reported."""

import logging as std_logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags
from ml_collections.config_flags import tuple_parser

from diva_jax.common import platforms, usage
from diva_jax.common.errors import RunError, Terminated, UserError, listing, printable

_LINGER = 10.0  # Seconds for threads to end after a command has; one of them may wait for a disk that is gone.
_LONGEST = 10_000  # Characters of a message; values that it quotes may be of any length.
_INTERRUPTED = 130  # Exit code after SIGINT, as shells have it.
_TERMINATED = 143  # Exit code after SIGTERM, unless a training run has saved.
_CONFIGS = Path(__file__).parents[1] / "configs"
_UNKNOWN_FIELD = re.compile(r'Did you mean "(\w+)" instead of "(\w+)"')
_FIELD = re.compile(r"--?(?:no)?config\.([\w.]+)")
_handled = 0  # Signals for which an exception was raised.


class _Tuples(tuple_parser.TupleParser):
    """ml_collections' parser of tuples, and texts with commas between them: `mmvp=data/MMVP_VLM,drift=data/photos`."""

    def parse(self, argument):
        try:
            return super().parse(argument)
        except ValueError:
            if argument.lstrip()[:1] in ("(", "[", "'", '"'):
                raise
            return tuple(part.strip() for part in argument.split(",") if part.strip())


config_flags.register_flag_parser_for_type(tuple, _Tuples())


def _with_config_found(argument: str) -> str:
    """`--config=vitl14:faithful` -> `--config=.../configs/vitl14.py:faithful`, of the configs of this package.

    Raises:
      UserError: there is neither such a file nor such a config.
    """
    flag, given, value = argument.partition("=")
    name, colon, variant = value.partition(":")
    if flag not in ("--config", "-config") or not given or os.path.isfile(name):
        return argument
    found = _CONFIGS / (Path(name).name.removesuffix(".py") + ".py")
    if Path(name).parent.name not in ("", "configs") or not name or not found.is_file():
        known = sorted(f.stem for f in _CONFIGS.glob("*.py"))
        raise UserError(
            f"--config={value}: there is no such file: give one, or the name of a config: {listing(known, 50)}"
        )
    return f"{flag}={found}{colon}{variant}"


def _joined(argv: Sequence[str]) -> list[str]:
    """`--config FILE` -> `--config=FILE`; other arguments as they are."""
    out = []
    for argument in argv:
        if out and out[-1] in ("--config", "-config"):
            out[-1] += f"={argument}"
        else:
            out.append(argument)
    return out


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


def _reason(e: Exception) -> str:
    """What absl or ml_collections complain of; a KeyError's text is the repr of its argument, and may be nested."""
    while isinstance(e, KeyError) and e.args:
        if not isinstance(e.args[0], Exception):
            break
        e = e.args[0]
    message = str(e.args[0]) if isinstance(e, KeyError) and e.args else str(e)
    if (match := _UNKNOWN_FIELD.search(message)) or isinstance(e, KeyError):
        hint, field = match.groups() if match else ("", message.strip("'"))
        named = next((a for a in sys.argv[1:] if _FIELD.match(a) and field in _FIELD.match(a)[1].split(".")), field)
        return f"{named}: the config has no field {field}" + (f"; did you mean {hint}?" if hint else "")
    head, broken, trace = message.partition("Error whilst parsing config file:")  # Followed by Python's traceback.
    return head + trace.strip().splitlines()[-1] if broken else message


def _parse(argv: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Parses flags; any complaint of absl or ml_collections becomes a UserError, as do missing `arguments`."""
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as e:
        raise UserError(f"{_reason(e)} (see --help)") from e
    known = len(arguments) + 1
    if len(rest) > known:
        raise UserError(f"unexpected argument {rest[known]!r}: every other option is a flag, see --help")
    if len(rest) < known:
        raise UserError(f"{arguments[len(rest) - 1]} is missing: give it as an argument, see --help")
    return rest


def _inform(main: Callable[..., None], arguments: Sequence[str], described: Callable | None) -> None:
    """Prints the help or the version where that is asked for, and ends the process."""
    asked = [a for a in sys.argv[1:] if a in (*usage.HELP, *usage.VERSION)]
    if not asked:
        return
    if asked[0] in usage.VERSION:
        print(usage.version())
        sys.exit(0)
    fields = ()
    if described and any(a.startswith("--config=") for a in sys.argv):
        sys.argv[:] = [a for a in sys.argv if a not in asked and (a.startswith("--config") or a == sys.argv[0])]
        _parse(sys.argv, ())
        fields = described(config_of(flags.FLAGS["config"]))
    print(usage.text(main, arguments, fields))
    sys.exit(0)


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


class _Plain(std_logging.Formatter):
    """`warning: the message`, on one line and without a time and a place in the source."""

    def format(self, record) -> str:
        return printable(f"{record.levelname.lower()}: {' '.join(record.getMessage().split())}")


def _on_sigint(*_) -> None:
    """Raises KeyboardInterrupt; ends the process a little later where that was lost, as in a callback of jax."""
    global _handled
    _handled += 1
    _end_within(_LINGER, _INTERRUPTED, "interrupted")
    raise KeyboardInterrupt


def _on_sigterm(*_) -> None:
    """As `_on_sigint`, for SIGTERM; what the command has begun to write is removed on the way out."""
    global _handled
    _handled += 1
    _end_within(_LINGER, _TERMINATED, "terminated")
    raise Terminated


def _send(number: signal.Signals, handled: int) -> None:
    """Sends a signal to the main thread until it is handled; one that comes as a wait begins does not end the wait."""
    while _handled == handled:
        time.sleep(0.1)
        signal.pthread_kill(threading.main_thread().ident, number)


def _on_unraisable(found) -> None:
    """Handles an exception where nothing could catch it, such as in a callback of the garbage collector.

    A signal's is raised again a moment later. Threads of a save that failed leave errors of their closed event loop;
    the failure itself is reported where it is waited for.
    """
    again = {KeyboardInterrupt: signal.SIGINT, Terminated: signal.SIGTERM}.get(found.exc_type)
    if again is not None:
        threading.Thread(target=_send, args=(again, _handled), daemon=True).start()
    elif "Event loop is closed" not in str(found.exc_value):
        sys.__unraisablehook__(found)


def _write_trace() -> str:
    """Writes the trace of the present exception to a new file in the folder for temporary files; returns its name."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="diva_jax_", suffix=".log", delete=False, encoding="utf-8") as f:
            f.write(f"{' '.join(sys.argv)}\n\n{traceback.format_exc()}")
        return f"the full trace is in {f.name}"
    except OSError as e:
        return f"the full trace could not be written ({e})"


def run(main: Callable[..., None], arguments: Sequence[str] = (), described: Callable | None = None) -> None:
    """Runs a command: flags parsed, every error reported as one line.

    Exit codes: 2 for `UserError`; 1 for `RunError` and for unexpected exceptions, whose trace is written to
    a file; 130 after SIGINT; 143 after SIGTERM.

    Args:
      main: called with the values of `arguments`.
      arguments: names of what the command takes besides flags, in order; all are required.
      described: config -> its fields, for `--help` with a config, see `usage.text`.
    """

    def report(message: str, code: int):
        print(printable(" ".join(message.split()))[:_LONGEST], file=sys.stderr, flush=True)
        _end_within(_LINGER, code)
        sys.exit(code)

    def guarded(argv):
        platforms.without_tpu()
        # transformers otherwise says that PyTorch is missing, which no command needs.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax and grain log many lines for every save.
        logging.get_absl_handler().setFormatter(_Plain())
        main(*argv[1:])
        _end_within(_LINGER, 0)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _on_sigint)
        signal.signal(signal.SIGTERM, _on_sigterm)
        sys.unraisablehook = _on_unraisable
    try:
        sys.argv[1:] = [_with_config_found(a) for a in _joined(sys.argv[1:])]
        _inform(main, arguments, described)
        app.run(guarded, flags_parser=lambda argv: _parse(argv, arguments))
    except UserError as e:
        report(f"error: {e}", 2)
    except RunError as e:
        report(f"error: {e}", 1)
    except KeyboardInterrupt:
        report("interrupted", _INTERRUPTED)
    except Terminated:
        report("terminated", _TERMINATED)
    except Exception as e:
        said = " ".join(f"{type(e).__name__}: {e}".split())[:300]
        report(f"error: unexpected ({said}): {_write_trace()}, please report it", 1)
