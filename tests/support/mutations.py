"""Generated damage: changes of fields of JSON content, and of bytes of files."""

import copy
import functools
import json
import operator

import numpy as np

from diva_jax.common.errors import UserError

# Values in place of any other; those of text are what files of configs may be misused for.
WRONG = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "0", "../../etc/passwd", "/", "\x00\x1b[31m\n", "9" * 5000, "<script>alert(1)</script>", "=1+1"),
    *([], {}, [[]], [None], [1, 2], [float("nan"), 1], ["x"] * 3, {"": None}, {"x": {"y": []}}),
]


def outcome(read, *named):
    """What `read` gives, or None where it refuses in one short line that names these; nothing else is caught."""
    try:
        return read()
    except UserError as e:
        said = str(e)
        assert "\n" not in said.strip() and len(said) < 2000 and all(str(n) in said for n in named), said
        return None


def places(tree, path=()) -> list[tuple]:
    """The paths of all values below the root of JSON content."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [p for key, value in items for p in [(*path, key), *places(value, (*path, key))]]


def changed(rng: np.random.Generator, tree, count: int = 1):
    """(a copy of JSON content with values replaced, removed, renamed, added or put elsewhere, what was changed)."""
    tree, said = copy.deepcopy(tree), []
    for _ in range(count):
        if not (there := places(tree)):
            break
        *path, key = there[rng.integers(len(there))]
        node = functools.reduce(operator.getitem, path, tree)
        what, value = int(rng.integers(10)), WRONG[rng.integers(len(WRONG))]
        if what <= 5:
            node[key] = copy.deepcopy(value)
        elif what == 6:
            del node[key]
        elif what == 7 and isinstance(node, dict):
            node[["x", "", "../a", "a/b"][rng.integers(4)]] = node.pop(key)
        elif what == 8 and isinstance(node[key], int | float):
            node[key] = [-node[key], node[key] + 1, node[key] * 1000, str(node[key]), [node[key]]][rng.integers(5)]
        else:
            *other, last = there[rng.integers(len(there))]
            source = functools.reduce(operator.getitem, other, tree)
            node[key] = copy.deepcopy(source[last]) if other != path else None
        said.append((*path, key, what))
    return tree, said


def damaged(rng: np.random.Generator, data: bytes, most: int = 4) -> bytes:
    """Bytes of which one to `most` places are overwritten, inserted, removed, cut off or repeated."""
    data = bytearray(data)
    for _ in range(int(rng.integers(1, most + 1))):
        if not data:
            break
        at, n, mark = int(rng.integers(len(data))), int(rng.integers(1, 9)), b"\x00\r\n,\"'{}[]:-eE"[rng.integers(14)]
        flipped = data[at] ^ 1 << n - 1
        changes = [(1, rng.bytes(1)), (1, [flipped]), (1, [mark]), (0, rng.bytes(n)), (0, data[: 8 * n])]
        removed, new = [*changes, (n, b""), (len(data), b"")][rng.integers(7)]
        data[at : at + removed] = new
    return bytes(data)


def damaged_file(rng: np.random.Generator, name: str, data: bytes) -> bytes:
    """Content with bytes changed or, in two of three cases of JSON, fields, of one line of JSON lines."""
    if rng.integers(3) == 0 or not name.lower().endswith(("json", "jsonl", "metadata")):
        return damaged(rng, data)
    lines = data.splitlines() if name.endswith("jsonl") else [data]
    i = int(rng.integers(len(lines)))
    lines[i] = json.dumps(changed(rng, json.loads(lines[i]), 2)[0]).encode()
    return b"".join(line + b"\n" for line in lines)
