"""The names that a misspelt name, or one of another program, may mean: of fields, arguments and choices."""

import difflib
import functools
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from diva_jax.common.errors import listing


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
