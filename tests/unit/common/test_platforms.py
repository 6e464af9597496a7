"""jax looks for no TPU where libtpu is installed and nothing hints at one."""

import importlib.util
from pathlib import Path

import jax
import pytest

from diva_jax.common import platforms


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine without devices, with libtpu, on which jax has not been told what to use; sets what it has."""
    found, find = {"libtpu": True, "jax_plugins": None}, importlib.util.find_spec
    monkeypatch.setattr(platforms.importlib.util, "find_spec", lambda n: found[n] if n in found else find(n))
    files = {"/sys/bus/pci/devices/*": [], "/dev/accel*": [], "/dev/vfio/[0-9]*": []}
    monkeypatch.setattr(platforms.glob, "glob", files.__getitem__)
    for name in ("JAX_PLATFORMS", *platforms._NAMED):
        monkeypatch.delenv(name, raising=False)
    used = []
    monkeypatch.setattr(jax.config, "update", lambda *setting: used.append(setting))
    monkeypatch.setattr(
        platforms.jax, "config", type("Config", (), {"jax_platforms": None, "update": jax.config.update})
    )

    def pci(vendor: str, device: str):
        folder = tmp_path / device
        folder.mkdir()
        (folder / "vendor").write_text(f"{vendor}\n")
        (folder / "device").write_text(f"{device}\n")
        files["/sys/bus/pci/devices/*"].append(str(folder))

    return found, files, pci, used, tmp_path


CPU = [("jax_platforms", "cpu")]


def test_without_a_tpu_the_cpu_alone(machine):
    *_, used, _ = machine
    platforms.without_tpu()
    assert used == CPU


def test_a_network_card_of_googles_is_no_tpu(machine):
    _, _, pci, used, _ = machine
    pci("0x1ae0", "0x0042")
    pci("0x8086", "0x0063")
    platforms.without_tpu()
    assert used == CPU


def test_a_tpu_is_left_alone(machine, monkeypatch):
    found, files, pci, used, folder = machine
    with monkeypatch.context() as m:
        m.setenv("TPU_NAME", "local")
        platforms.without_tpu()
    with monkeypatch.context() as m:
        m.setenv("JAX_PLATFORMS", "tpu,cpu")
        platforms.without_tpu()
    files["/dev/vfio/[0-9]*"] = ["/dev/vfio/0"]
    platforms.without_tpu()
    files["/dev/vfio/[0-9]*"] = []
    found["jax_plugins"] = type("Spec", (), {"submodule_search_locations": [str(folder)]})
    (Path(folder) / "xla_cuda13").mkdir()
    platforms.without_tpu()  # A GPU's library is installed too.
    found["jax_plugins"] = None
    found["libtpu"] = None
    platforms.without_tpu()
    found["libtpu"] = True
    pci("0x1ae0", "0x0077")  # A chip of a later generation.
    platforms.without_tpu()
    assert used == []
