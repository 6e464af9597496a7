"""Every config field is declared once, with possible and impossible values; what a wrong name may mean."""

import dataclasses
import functools
import importlib.util
import json
import math
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import small
from helpers import refused
from ml_collections import ConfigDict
from places import ROOT

from diva_jax import __main__ as listing, config, objectives
from diva_jax.common import errors, fields
from diva_jax.common.fields import field

# One of them is of another type than any default.
WILD = (-1, -(10**12), 10**15, 0.5, -0.5, math.nan, math.inf, "abc", "", "(", None, (), (1,), (math.nan, 1.0), True, {})


@pytest.mark.parametrize("objective", objectives.names())
def test_every_field_is_documented_and_has_impossible_values(objective):
    c = config.default(objective=objective)
    config.validate(c, 1)
    declared = config.declared(objective)
    assert declared.keys() == fields.flatten(c, declared).keys() and len(declared) > 100
    for name, declaration in declared.items():
        assert re.fullmatch(r"[A-Z].*\.( \[[^]]+\])?|[A-Z].*( \[[^]]+\])\.", declaration.doc), name
        assert declaration.problem(declaration.default) is None, name
        wrong = [value for value in WILD if declaration.problem(value)]
        assert len(wrong) >= 2, name
        for value in wrong[:1] + wrong[-1:]:
            refused(rf"\Aconfig\.{re.escape(name)}=.* must be .*\Z", fields.check, {name: value}, declared)
    # `validate` knows the last field of each section.
    for name in {name.rpartition(".")[0]: name for name in declared}.values():
        section, _, leaf = name.rpartition(".")
        tree = config.default(objective=objective).to_dict()
        functools.reduce(dict.__getitem__, section.split(".") if section else [], tree)[leaf] = None
        refused(re.escape(f"config.{name}=None must be "), config.validate, ConfigDict(tree), 1)


def test_the_page_is_current():
    current = (ROOT / "docs/CONFIG.md").read_text() == runpy.run_path(str(ROOT / "bench/config_page.py"))["page"]()
    assert current, "docs/CONFIG.md: run python bench/config_page.py --docs=docs/CONFIG.md"


@dataclasses.dataclass(frozen=True)
class Inner:
    pair: tuple[int, ...] = field((1, 2), "Two numbers.")
    text: str = field("a", "A text.", fields.one_of("", "a"))


@dataclasses.dataclass(frozen=True)
class Outer:
    number: int = field(1, "A number.", fields.between(0, 3))
    part: dict = field({"a": {"b": 1}}, "A section of another library.")
    inner: Inner = Inner(text="")


def test_sections():
    c = fields.config_dict(Outer)
    assert c.to_dict() == {"number": 1, "part": {"a": {"b": 1}}, "inner": {"pair": (1, 2), "text": ""}}
    assert list(fields.declared(Outer)) == ["number", "part", "inner.pair", "inner.text"]
    assert fields.parse(Outer, c, "config.o") == Outer()
    c.inner.pair = (3, 4)
    stored = json.loads(c.to_json()) | {"number": 2}
    del stored["inner"]["text"]
    assert fields.parse(Outer, stored, "config.o") == Outer(2, inner=Inner((3, 4), ""))
    for values, says in (
        ({"number": 4}, "config.o.number=4 must be 0 to 3"),
        ({"number": True}, "config.o.number=True must be a whole number"),
        ({"inner": {"text": "b"}}, "config.o.inner.text='b' must be '' or a"),
        ({"inner": {"other": 1, "one": 2}}, "the config has no field o.inner.other, o.inner.one"),
        ({"inner": 3}, "the config has no field o.inner: "),
    ):
        refused(f"^{re.escape(says)}", fields.parse, Outer, values, "config.o")


@pytest.mark.parametrize("name, value", [
    *(("trainable", v) for v in ("abc", (("a",),), (("a", "b"),), ((".*", -1.0),), ((".*", math.nan),), 3)),
    *(("backbone.mean", v) for v in ((0.5,), (0.1, 0.2, 0.3, 0.4), (0.1, math.nan, 0.2), 0.5, (123.0, 117.0, 104.0))),
    *(("backbone.select", v) for v in ("random:99999999", "runs:0", "random:" + "9" * 5000, "random", "random:")),
    *(("backbone.select", v) for v in ("", "random:0", "all:3", "runs:-1", "first:4")),
    *(("optim." + f, 1.0) for f in ("b1", "b2", "momentum", "warmup")),
    ("seed", 2**32), ("steps", True),
])  # fmt: skip
def test_named_values(name, value):
    refused(f"config.{name}=", lambda: fields.check({name: value}, config.declared("diva")))


@pytest.mark.parametrize("rule, good, bad", [
    (fields.at_least(1), (1, 10**12), (0, -5, 1.5, True, "1")),
    (fields.above(0), (1e-9, 3.0), (0.0, -1e-9, math.nan, math.inf)),
    (fields.between(0, 1), (0.0, 0.5, 1), (-1e-9, 1.001, math.nan, math.inf, None)),
    (fields.below(0, 1), (0.0, 0.999), (1.0, 5, -0.1, math.nan)),
    (fields.pair(0.1, 2), ((0.1, 2), (1, 1)), (0.5, "abc", (2, 1), (0, 1), (1, 3), (1,), (1, math.inf))),
    (fields.one_of("a", ""), ("a", ""), ("b", "A", None, ())),
])  # fmt: skip
def test_rules_hold_up_to_their_bounds(rule, good, bad):
    declared = fields.Field(good[0], rule=rule)
    assert not any(map(declared.problem, good)) and all(map(declared.problem, bad))


def test_a_typing_error_in_any_field_finds_it():
    """In every second one."""
    rng, seen = np.random.default_rng(0), set()
    for objective in objectives.names():
        known = list(fields.flatten(config.default(objective=objective)))
        for path in [path for path in known if path not in seen][::2]:
            section, _, name = path.rpartition(".")
            i = int(rng.integers(len(name)))
            for wrong in (name[:i] + "x" + name[i:], name.upper(), name.replace("_", "-")):
                if len(name) > 3:
                    assert path in errors.nearest(f"{section}.{wrong}".lstrip("."), known), (path, wrong)
            # The section is forgotten, or written otherwise.
            if len([p for p in known if p.rpartition(".")[2] == name]) <= 3:
                assert path in errors.nearest(name, known) or name in known
                assert path in errors.nearest(f"other.{name}", known)
        seen |= set(known)


WORDS = json.loads(Path(__file__).with_name("words.json").read_text())


@pytest.mark.parametrize("wrong, meant", WORDS.items())
def test_words_of_other_programs(wrong, meant):
    says = f"^the config has no field {wrong}; did you mean .*{meant}.*[?]$"
    refused(says, fields.require, config.default(), [wrong])


def test_sections_are_fields_nonsense_has_no_neighbour_and_values_must_fit():
    fields.require(config.default(), ["optim", "diffusion.unet", "steps"])
    for wrong, says in (
        (["q.zzz"], "no field q.zzz: --config=FILE --help lists all that exist"),
        (["stepps", "lr"], "no field stepps, lr; did you mean steps or optim.lr?"),
    ):
        refused(says, fields.require, config.default(), wrong)
    refused(r"config.trainable=\(\) must have rows", lambda: config.validate(small.diva_config(trainable=()), 1))
    refused("JAX_ENABLE_X64", lambda: config.validate(small.diva_config(dtype="float64"), 1))
    wrong = small.diva_config(data__image_size=25)
    refused("config.data.image_size=25 must be a multiple of 2", config.validate, wrong, 1)


DOCUMENTED = ("main", "evaluate", "export_torch", "report", "aot", "selfcheck", "cache_latents", "demo", "world.demo")


def test_every_command_is_listed_with_a_sentence_and_found_by_a_wrong_word(capsys):
    assert listing.main([]) == 0
    found = dict(line.removeprefix("python -m ").split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[2:])
    assert {f"diva_jax.{name}" for name in DOCUMENTED} <= found.keys()
    for name, sentence in found.items():
        assert importlib.util.find_spec(name) and len(sentence) > 5, name
    for wrong, meant in (("evalute", "evaluate"), ("export", "export_torch"), ("man", "main")):
        assert listing.main([wrong]) == 2 and f"diva_jax.{meant}" in capsys.readouterr().err
