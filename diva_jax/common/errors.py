"""Errors with a message for the user; `common.cli` prints them."""

import contextlib
import difflib
import functools
import re
import sysconfig
import traceback
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

_MAX_CHARS = 1600  # A screen of 20 lines.


class _Message(Exception):
    """An error whose message is cut in its middle where it is longer than a screen: its end says what to do."""

    def __init__(self, message: object = ""):
        text = str(message)
        if len(text) > _MAX_CHARS:
            text = f"{text[: _MAX_CHARS - 500]} [...] {text[-490:]}"
        super().__init__(text)


class UserError(_Message):
    """Bad input. The message is one sentence that says what is wrong and what to do; exit code 2."""


class RunError(_Message):
    """The run itself failed (a loss that is not finite, too many broken images); exit code 1."""


class Terminated(BaseException):
    """SIGTERM came where there is nothing to save."""


def reason(e: BaseException) -> str:
    """An exception on one line; those of object stores can be pages long."""
    return " ".join(f"{type(e).__name__}: {e}".split())[:300]


@contextlib.contextmanager
def explained(problem: str, advice: str, *types: type[Exception], kind: type[Exception] = UserError) -> Iterator[None]:
    """Context manager in which an exception of some types, by default an OSError, becomes an error of the `kind` whose
    message is "PROBLEM (what it says): ADVICE"; a `UserError` or `RunError` stays what it is. Of a bucket that does not
    answer it is a RunError, after which a pod starts again."""
    try:
        yield
    except Exception as e:
        if not isinstance(e, types or OSError) or (isinstance(e, _Message) and UserError not in types):
            raise
        plain = type(e) is OSError or getattr(e, "errno", None) or isinstance(e, ValueError | UserError)
        said = getattr(e, "strerror", None) or (" ".join(str(e).split())[:300] if plain else "")
        passes = type(e).__module__.partition(".")[0] in _STORES and getattr(e, "code", None) not in (400, 401, 403)
        kind = RunError if passes else kind
        raise kind(f"{problem} ({said or reason(e)}): {advice}") from e


# Exceptions of these packages mean that a store does not answer; a missing file or right is an exception of Python's.
_STORES = ("aiohttp", "gcsfs")
# Folders and files of modules that a config names: somebody's own code, even where it is installed.
named_by_configs: set[str] = set()


def place(error: BaseException) -> str:
    """`FILE:LINE` where an error comes from in somebody's own code; "" where all of it is a library's or ours."""
    libraries = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    libraries += [str(Path(__file__).parents[1]), "<"]
    lines = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        lines.append((error.filename or "<", error.lineno))
    for file, line in reversed(lines):
        if not file.startswith(tuple(libraries)) or file.startswith(tuple(named_by_configs)):
            return f"{file}:{line}"
    return ""


def listing(names: Sequence[str], limit: int = 20) -> str:
    """`a, b, c`, cut with a count past `limit` names."""
    names = [printable(n if len(n) <= 500 else f"{n[:500]}...").replace("\n", "\\n") for n in map(str, names)]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def brief(value: object, most: int = 100) -> str:
    """A value as Python writes it, cut after `most` characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def printable(text: str) -> str:
    """The text with control characters, such as those in names of files, written as escapes."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _plain(text: str) -> str:
    return re.sub("[^a-z0-9]", "", text.lower())


@functools.cache
def _same_words() -> list[frozenset[str]]:
    """Groups of words for the same, of this program and of others; a name ends with one of them."""
    groups = Path(__file__).with_name("same_words.txt").read_text("utf-8").splitlines()
    return [frozenset(map(_plain, group.split())) for group in groups]


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """The known names, which may be dotted paths, that a name may mean: at most three, the likeliest first."""
    section, _, end = name.rpartition(".")
    last, found = _plain(end), []
    same = {word for words in _same_words() if last in words for word in words}
    for path in known:
        own = _plain(path.rpartition(".")[2])
        share = difflib.SequenceMatcher(None, last, own).ratio()
        inside = min(len(own), len(last)) >= 4 and (own in last or last in own)
        rank = 2 if own == last or name.startswith(f"{path}.") else 1 if own in same else 0
        if rank or share >= 0.75 or inside:
            alike = difflib.SequenceMatcher(None, _plain(name), _plain(path)).ratio()
            found.append((-rank, path.rpartition(".")[0] != section, -alike, path))
    found.sort()
    # Beside a name that is the same or of the same meaning, those that only look alike are left out.
    return [path for rank, *_, path in found if bool(rank) == bool(found[0][0])][:3]


def unknown(owner: str, names: Collection[str], known: Collection[str], otherwise: str) -> str:
    """One sentence on names that do not exist, with the known ones that are meant, or else what to do otherwise: `OWNER
    lr; did you mean optim.lr?`, where `owner` may be "the config has no field"."""
    near = dict.fromkeys(n for name in names for n in nearest(name, known)[: 1 if len(names) > 1 else None])
    advice = f"; did you mean {' or '.join(near)}?" if near else f": {otherwise}"
    return f"{owner} {listing(list(names))}{advice}"
