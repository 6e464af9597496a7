"""Every field of every objective's config is documented, and docs/CONFIG.md is what its source makes of it."""

import dataclasses
import importlib.util

import pytest
from ml_collections import ConfigDict
from places import ROOT

from diva_jax import config, objectives
from diva_jax.common import comments


@pytest.mark.parametrize("name", objectives.names())
def test_every_field_has_a_comment(name):
    rows = config.described(config.default(objective=name))
    assert not [field for field, _, comment in rows if not comment]
    assert len({field for field, _, _ in rows}) == len(rows) > 80


def test_the_page_is_current():
    spec = importlib.util.spec_from_file_location("config_page", ROOT / "bench/config_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    current = (ROOT / "docs/CONFIG.md").read_text() == module.page()
    assert current, "docs/CONFIG.md: run python bench/config_page.py --docs=docs/CONFIG.md"


def section() -> ConfigDict:
    c = ConfigDict()
    c.a = 1  # Of a.
    # On two
    # lines.
    c.b = ConfigDict()
    c.b.x, c.b.y = 1, 2  # Of both.
    c.b.z = 3  # Inside.
    local = 4  # Not a field.

    c.none = local
    return c


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Attributes:
      first, second: in the docstring,
        on two lines.
    """

    first: int = 1
    second: int = 2
    third: str = "#"  # A comment; with a # in it.


def test_comments_are_found_where_they_stand():
    found = comments.of(section)
    assert found == {"a": "Of a.", "b": "On two lines.", "b.x": "Of both.", "b.y": "Of both.", "b.z": "Inside."}
    both = "in the docstring, on two lines."
    assert comments.of(Options) == {"first": both, "second": both, "third": "A comment; with a # in it."}
