"""The choice of kernels: what config.kernels means on a TPU, by what the check of the device has found."""

import jax
import pytest
from helpers import abstract_mesh

from diva_jax.common import log
from diva_jax.common.errors import UserError
from diva_jax.training import compiler, distributed

V5E, V6E = "TPU v5 lite", "TPU v6 lite"
HEADS, CHANNELS = "attention 64", "feed-forward 320"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    log.say_once.cache_clear()


def chosen(setting="auto", kind=V5E, platform="tpu", **kw):
    return compiler.chosen_kernels(setting, abstract_mesh(platform, kind=kind), **kw)


def test_auto_takes_what_has_passed_on_this_kind_of_device(capsys):
    assert chosen() == frozenset()
    assert "not checked" in (said := capsys.readouterr().out) and "diva_jax.selfcheck" in said
    compiler.keep_checked(V5E, {HEADS: True, CHANNELS: False})
    assert chosen() == chosen() == {HEADS} and chosen(kind=V6E) == frozenset()
    assert capsys.readouterr().out.count(HEADS) == 1, "one line for all programs of a process"
    compiler.keep_checked(V5E, {CHANNELS: True, "attention 72": False})
    assert chosen() == {HEADS, CHANNELS}
    assert chosen("own") is None and chosen("xla") == frozenset()


def test_without_a_tpu_nothing_is_read_or_said(capsys, tmp_path):
    compiler.checked_file("any").parent.mkdir()
    compiler.checked_file("any").write_text("damaged")
    assert [chosen(platform=p, kind="any") for p in ("cpu", "gpu")] == [frozenset()] * 2
    assert compiler.chosen_kernels("auto", jax.sharding.AbstractMesh((1, 1), ("data", "fsdp"))) == frozenset()
    assert not capsys.readouterr().out


def test_processes_agree(monkeypatch):
    """A kernel must have passed on one of them and have failed on none."""
    others = [{}, {HEADS: True, CHANNELS: False}, {"attention 72": True}]
    monkeypatch.setattr(distributed, "gathered", lambda mine: [mine, *others])
    compiler.keep_checked(V5E, {CHANNELS: True})
    assert chosen() == {HEADS, "attention 72"}


@pytest.mark.parametrize("what", ["version", "kernel"])
def test_another_version_or_another_kernel_was_not_checked(what, monkeypatch, tmp_path):
    compiler.keep_checked(V5E, {HEADS: True})
    assert chosen()
    if what == "version":
        monkeypatch.setattr(compiler.importlib.metadata, "version", lambda package: "9")
    else:
        (tmp_path / "flash.py").write_text("changed")
        monkeypatch.setattr(compiler, "_SOURCES", tmp_path)
    assert not chosen()


@pytest.mark.parametrize("content", ["", "[]", '{"kernels": {"attention 64": 1}}', '{"kernels": ["attention 64"]}'])
def test_a_damaged_file_is_refused_with_what_to_do(content):
    file = compiler.keep_checked(V5E, {HEADS: True})
    file.write_text(content)
    with pytest.raises(UserError, match="remove it"):
        chosen()
