"""What every command shares: flags, `--config`, help, and how errors and signals end it."""

import errno
import faulthandler
import functools
import gc
import logging as std_logging
import os
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Sequence

import jax
from absl import flags, logging
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import tuple_parser

from diva_jax import __version__
from diva_jax.common import config_files, errors, fields
from diva_jax.common.errors import RunError, Terminated, UserError, place, printable

# Time in which threads must end after a command has ended; one of them may wait for a disk that is gone [s].
_LINGER_S = 10.0
# Values that a message quotes may be of any length.
_MAX_MESSAGE_CHARS = 10_000
# What a signal raises -> the signal, the exit code, as shells have it, and what is said; a training run that has saved
# ends with 0 after SIGTERM.
_SIGNALS = {KeyboardInterrupt: (signal.SIGINT, 130, "interrupted"), Terminated: (signal.SIGTERM, 143, "terminated")}
_FIELD_FLAG = re.compile(r"--?(?:no)?config\.([\w.]+)")
# What absl, ml_collections and Python say of a flag -> what is said here.
_SAID = {
    r"invalid literal for int\(\).*": "it must be a whole number",
    r"could not convert string to float.*": "it must be a number",
    r"\('Non-boolean argument.*": "it must be True or False",
    r"Found (--\S+) in argv before.*": r"\1 changes a field of --config, which must come before it",
}
# The flags that all commands have.
_EVERYWHERE = {
    "help": "Print this; with --config=FILE also every field with its value.",
    "version": "Print the version.",
}
# Types of the exceptions that signal handlers have raised.
_handled: list[type[BaseException]] = []

# Makes config -> [(dotted path, value, documentation)] of its fields.
Describe = Callable[[ConfigDict], Sequence[tuple[str, str, str]]]
flags.disclaim_key_flags()


class _TupleParser(tuple_parser.TupleParser):
    """ml_collections' parser of tuples, and texts with commas between them: `mmvp=data/MMVP_VLM,drift=data/photos`. One
    that begins as `probe=train=` lists folders, and the commas after it are its own."""

    def parse(self, argument):
        try:
            return super().parse(argument)
        except ValueError:
            if argument.lstrip()[:1] in ("(", "[", "'", '"'):
                raise
            parts = re.findall(r"\s*[\w.]+=[\w-]+=.*|[^,]+", argument)
            return tuple(part.strip() for part in parts if part.strip())


class _ConfigParser(flags.ArgumentParser):
    """Finds configs by name too, and checks that they have the fields which flags change."""

    def parse(self, path):
        config = config_files.read(path)
        fields.require(config, [m[1] for argument in sys.argv[1:] if (m := _FIELD_FLAG.match(argument))])
        return config


config_flags.register_flag_parser_for_type(tuple, _TupleParser())


def define_config(help: str = "The config file; --config.a.b=VALUE changes one field.") -> flags.FlagHolder:
    """Defines the flag `--config`."""
    holder = config_flags.DEFINE_config_file("config", None, help)
    flags.FLAGS["config"].parser = _ConfigParser()
    return holder


def define_trust() -> flags.FlagHolder:
    """Defines the flag `--trust_objective`."""
    return flags.DEFINE_bool(
        "trust_objective", False, "Import the modules that config.json of a workdir names; read them before."
    )


def config_of(flag: flags.FlagHolder) -> ConfigDict:
    """The config that a flag of `define_config` names; a UserError where the flag is missing."""
    if flag.value is None:
        raise UserError("--config is missing: give a config file, e.g. --config=configs/vitl14.py")
    config_files.trust(flag.value)
    return flag.value


def _reason(e: Exception) -> str:
    """What absl or ml_collections complain of; a KeyError's text is the repr of its argument, and may be nested."""
    while isinstance(e, KeyError) and e.args and isinstance(e.args[0], Exception):
        e = e.args[0]
    if isinstance(e, flags.UnrecognizedFlagError):
        config = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
        if e.flagname.startswith("config."):
            return f"--{e.flagname} changes a field of --config, which is missing: add --config=FILE"
        names = [name for name in flags.FLAGS if not name.startswith("config.")]
        of_config = errors.nearest(e.flagname, fields.flatten(config or {}))
        found = errors.nearest(e.flagname, names) or [f"config.{name}" for name in of_config]
        return f"there is no flag --{e.flagname}" + (f"; did you mean --{' or --'.join(found)}?" if found else "")
    said = str(e.args[0]) if isinstance(e, KeyError) and e.args else str(e)
    return functools.reduce(lambda text, pair: re.sub(*pair, text, flags=re.DOTALL), _SAID.items(), said)


def _help(main: Callable, arguments: Sequence[str], describe: Describe | None) -> str:
    """The module's docstring, its flags and, with `--config`, all fields of the config with their values."""
    module, width = sys.modules[main.__module__], min(shutil.get_terminal_size().columns, 100)
    started = module.__name__ == "__main__"
    run = module.__spec__ if started else None  # None, too, where a script is run by its path.
    name = f"python -m {run.name.removesuffix('.__main__')}" if run else os.path.basename(sys.argv[0])
    own = flags.FLAGS.flags_by_module_dict().get(sys.argv[0] if started else module.__name__, ())

    def entry(head: str, body: str) -> str:
        body = body.partition(";\n")[0]  # What absl adds to flags that may be repeated.
        return f"  {head}\n{textwrap.fill(body, width, initial_indent=' ' * 6, subsequent_indent=' ' * 6)}"

    lines = [f"usage: {' '.join([name, *arguments, '[--FLAG=VALUE ...]'])}", "", module.__doc__.strip(), "", "flags:"]
    for flag in own:
        if not flag.name.startswith("config.") and flag.name not in _EVERYWHERE:
            unset = flag.default in (None, "", [], False) or flag.name == "config"
            lines.append(entry(f"--{flag.name}", flag.help if unset else f"{flag.help} Default: {flag.default}."))
    lines += [entry(f"--{name}", text) for name, text in _EVERYWHERE.items()]
    if describe and flags.FLAGS["config"].value is not None:
        lines += ["", "fields of the config, with the values that it has:"]
        lines += [entry(f"--config.{path}={value}", doc) for path, value, doc in describe(flags.FLAGS["config"].value)]
    return "\n".join(lines)


def _end_soon(code: int, message: str = "") -> None:
    """Ends the process after `_LINGER_S`, whatever its threads wait for, if it has not ended by then."""

    def end():
        if message:
            print(message, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    timer = threading.Timer(_LINGER_S, end)
    timer.daemon = True
    timer.start()


class _PlainFormatter(std_logging.Formatter):
    """`warning: the message`, on one line and without a time and a place in the source."""

    def format(self, record) -> str:
        return printable(f"{record.levelname.lower()}: {' '.join(record.getMessage().split())}")


def _raises(error: type[BaseException]) -> Callable:
    """A signal handler that raises; the process ends later where that was lost, as in a callback of jax."""

    def handle(*_):
        _handled.append(error)
        _end_soon(*_SIGNALS[error][1:])
        raise error

    return handle


def _send(number: signal.Signals, handled: int) -> None:
    """Sends a signal to the main thread until it is handled; one that comes as a wait begins does not end the wait."""
    while len(_handled) == handled:
        time.sleep(0.1)
        signal.pthread_kill(threading.main_thread().ident, number)


def _on_unraisable(lost) -> None:
    """Handles an exception where nothing could catch it, such as in a callback of the garbage collector: a signal's is
    raised again a moment later. A save that failed, which is reported elsewhere, leaves errors of its event loop."""
    if lost.exc_type in _SIGNALS:
        threading.Thread(target=_send, args=(_SIGNALS[lost.exc_type][0], len(_handled)), daemon=True).start()
    elif "Event loop is closed" not in str(lost.exc_value):
        sys.__unraisablehook__(lost)


def _run(main: Callable[..., None], arguments: Sequence[str], describe: Describe | None) -> None:
    try:
        given = flags.FLAGS(sys.argv)[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as e:
        raise UserError(f"{_reason(e)} (see --help)") from e
    if flags.FLAGS["version"].value:
        print(f"diva_jax {__version__}, jax {jax.__version__}, Python {sys.version.split()[0]}")
    elif flags.FLAGS["help"].value:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # A reader such as head may end before.
        print(_help(main, arguments, describe))
    else:
        if len(given) > len(arguments):
            raise UserError(f"unexpected argument {given[len(arguments)]!r}: every other option is a flag, see --help")
        if len(given) < len(arguments):
            raise UserError(f"{arguments[len(given)]} is missing: give it as an argument, see --help")
        if not flags.FLAGS["verbosity"].present:
            # orbax and grain log many lines for every save.
            logging.set_verbosity(logging.WARNING)
        if "trust_objective" in flags.FLAGS and flags.FLAGS["trust_objective"].value:
            config_files.trust()
        main(*given)
        _end_soon(0)


def _unexpected(e: BaseException) -> tuple[int, str]:
    """(exit code, what is said) of an exception that is being handled, whose trace is written to a file."""
    if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
        return 1, f"error: {e.strerror}: make room, and start the command again"
    said = errors.reason(e)
    if any(frame.filename.endswith("xla_bridge.py") for frame in traceback.extract_tb(e.__traceback__)[-1:]):
        problem = f"JAX has no device, JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r} ({said})"
        return 2, f"error: {problem}: unset it, or pip install -e '.[tpu]' or '.[cuda]', as this machine has devices"
    try:
        file = tempfile.NamedTemporaryFile("w", prefix="diva_jax_", suffix=".log", delete=False, encoding="utf-8")
        with file:
            file.write(f"{' '.join(sys.argv)}\n\n{traceback.format_exc()}")
        trace = f"the full trace is in {file.name}"
    except OSError as lost:
        trace = f"the full trace could not be written ({lost})"
    where = place(e)
    return 1, f"error: {where}: {said}; {trace}" if where else f"error: unexpected ({said}): {trace}, please report it"


def run(main: Callable[..., None], arguments: Sequence[str] = (), described: Describe | None = None) -> None:
    """Runs a command: flags parsed, `main` called with the values of `arguments`, every error reported as one line.
    Exit codes: 2 for `UserError`; 1 for `RunError` and for unexpected exceptions, whose trace is written to a file and
    which are named by their line where that is in a module of the user; 130 after SIGINT; 143 after SIGTERM.
    `described` makes config -> its fields, for `--help` with a config."""
    faulthandler.enable()
    # Tracing makes many objects and little garbage: a quarter of its time would be the search for it.
    gc.set_threshold(10_000, 20, 20)
    logging.use_absl_handler()
    logging.get_absl_handler().setFormatter(_PlainFormatter())
    # asyncio would log errors of a failed save, which is reported where the save is waited for.
    std_logging.getLogger("asyncio").setLevel(std_logging.CRITICAL)
    # transformers otherwise says that PyTorch is missing, which no command needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if threading.current_thread() is threading.main_thread():
        for error, (number, *_) in _SIGNALS.items():
            signal.signal(number, _raises(error))
        sys.unraisablehook = _on_unraisable
    for name, text in _EVERYWHERE.items():
        flags.DEFINE_bool(name, False, text, short_name="h" if name == "help" else None)
    try:
        _run(main, arguments, described)
        sys.exit(0)
    except (UserError, RunError) as e:
        message, code = f"error: {e}", 2 if isinstance(e, UserError) else 1
    except (*_SIGNALS, Exception) as e:
        # Where a signal comes while jax compares arguments, jax raises an exception of its own with the signal's trace.
        kind = type(e)
        if kind not in _SIGNALS and _handled and _handled[-1].__name__ in traceback.format_exc():
            kind = _handled[-1]
        code, message = _SIGNALS[kind][1:] if kind in _SIGNALS else _unexpected(e)
    print(printable(" ".join(message.split()))[:_MAX_MESSAGE_CHARS], file=sys.stderr, flush=True)
    _end_soon(code)
    if code in (130, 143) and not jax.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)  # A thread that still computes can crash while Python shuts down.
    sys.exit(code)
