"""The list of commands: python -m diva_jax."""

import importlib.util

import pytest

from diva_jax import __main__ as listing

DOCUMENTED = ("main", "evaluate", "export_torch", "report", "aot", "selfcheck", "cache_latents", "demo", "world.demo")


def test_every_command_is_listed_with_a_sentence(capsys):
    assert listing.main([]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    found = dict(line.removeprefix("python -m ").split(maxsplit=1) for line in lines)
    assert {f"diva_jax.{name}" for name in DOCUMENTED} <= found.keys()
    for name, sentence in found.items():
        assert importlib.util.find_spec(name) and len(sentence) > 5, name


@pytest.mark.parametrize("wrong, meant", [("evalute", "evaluate"), ("export", "export_torch"), ("man", "main")])
def test_a_wrong_command_finds_the_right_one(capsys, wrong, meant):
    assert listing.main([wrong]) == 2
    assert f"diva_jax.{meant}" in capsys.readouterr().err
