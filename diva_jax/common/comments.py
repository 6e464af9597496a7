"""Comments of fields, read from the source in which the fields are defined: the text of `--help` and docs/CONFIG.md."""

import ast
import functools
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Callable

_ATTRIBUTE = re.compile(r"^  (\w[\w, ]*): (.*)$")


def _comments(source: str) -> dict[int, tuple[str, bool]]:
    """Line -> (comment without `# `, whether it has the line to itself)."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found[token.start[0]] = (token.string.lstrip("# "), not token.line[: token.start[1]].strip())
    return found


def _names(target: ast.expr, in_class: bool) -> list[str]:
    """The fields that an assignment sets: `c.optim.lr` -> "optim.lr"; in a class its own names."""
    if isinstance(target, ast.Tuple):
        return [name for t in target.elts for name in _names(t, in_class)]
    if isinstance(target, ast.Name):
        return [target.id] if in_class else []
    return [ast.unparse(target).partition(".")[2]] if isinstance(target, ast.Attribute) else []


def _attributes(doc: str) -> dict[str, str]:
    """The entries of a docstring's section `Attributes:`."""
    found, names = {}, []
    for line in doc.partition("Attributes:\n")[2].split("\n"):
        if match := _ATTRIBUTE.match(line):
            names = [n.strip() for n in match[1].split(",")]
            found |= dict.fromkeys(names, match[2])
        elif line.startswith("    ") and names:
            found |= {n: f"{found[n]} {line.strip()}" for n in names}
        else:
            names = []
    return found


@functools.cache
def of(definition: type | Callable) -> dict[str, str]:
    """The comment of each field.

    Args:
      definition: a dataclass, whose fields are documented by comments or by `Attributes:` in its docstring; or a
        function that sets fields of a config (`c.optim.lr = 1e-4  # Peak.`). A comment is behind its field, or on the
        lines before it.

    Returns:
      Dotted path of a field -> its comment, for those that have one.
    """
    source = textwrap.dedent(inspect.getsource(definition))
    comments = _comments(source)
    found = _attributes(inspect.getdoc(definition) or "") if isinstance(definition, type) else {}
    body = ast.parse(source).body[0].body
    nodes = [n for top in body for n in ast.walk(top)] if not isinstance(definition, type) else body
    for node in nodes:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        fields = [n for t in targets for n in _names(t, isinstance(definition, type))]
        lines = [comments[i][0] for i in range(node.lineno, node.end_lineno + 1) if i in comments]
        above = node.lineno - 1
        while not lines[:1] and above in comments and comments[above][1]:
            above -= 1
        text = " ".join(lines) or " ".join(comments[i][0] for i in range(above + 1, node.lineno))
        found |= dict.fromkeys(fields, text) if text else {}
    return found
