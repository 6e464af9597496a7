"""Every config file builds, as shapes, and is what the published table says."""

import importlib.util
from pathlib import Path

import jax
import pytest
from places import ROOT

from diva_jax import config
from diva_jax.models import backbones
from diva_jax.objectives import condition
from diva_jax.training import partition, sharding
from diva_jax.training.step import Program

FILES = sorted(f for f in (ROOT / "configs").glob("*.py") if "objective=" not in f.read_text())  # DIVA's.


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_eight_rows_have_a_config():
    assert set(backbones.TABLE) <= {f.stem for f in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_config_builds_as_shapes(path):
    module = load(path)
    assert "python -m diva_jax.main --config=configs/" in module.__doc__
    c = module.get_config()
    config.validate(c, 1 if path.stem == "tiny" else 16)  # a v5e:4x4
    c.mesh.fsdp = 1
    p = Program(c, sharding.make_mesh(c.mesh, jax.devices()[:1]))
    spec = backbones.spec_of(c)
    if path.stem in backbones.TABLE:
        assert spec == backbones.TABLE[path.stem]
    # 865.9 M: the U-Net of Stable Diffusion 2.1-base, the VAE's encoder beside it.
    unet = sum(a.size for n, a in p.arrays.items() if n.startswith("unet/"))
    assert path.stem == "tiny" or unet == 865_910_724
    assert {n.split("/")[0] for n in p.trained} == {"vision", "visual_proj"}
    assert "total" in partition.summary(p.arrays, p.trained)
    shape = p.arrays["visual_proj/kernel"].shape
    assert shape == (spec.embed_dim, c.diffusion.unet.cross_attention_dim)


def test_tokens_of_the_eight_conditions():
    """DIVA's authors' code, by backbone."""
    counts = {n: condition.token_count(s.select, s.patches) for n, s in backbones.TABLE.items()}
    assert counts == {
        "vitl14": 77,
        "vitl14_336": 77,
        "metaclip_l14": 257,
        "metaclip_h14": 257,
        "dfn_h14": 257,
        "dfn_h14_378": 365,
        "siglip_so400m": 43,
        "siglip_so400m_384": 73,
    }


def test_published_recipe():
    c = load(FILES[0].with_name("vitl14.py")).get_config()
    o = c.optim
    assert (o.name, o.lr, o.momentum, o.weight_decay, o.clip) == ("sgd", 1e-4, 0.9, 0.0, 1.0)
    assert (c.batch_size, c.steps, c.diva.draws, c.data.image_size, c.dtype) == (640, 4600, 2, 512, "bfloat16")
    assert set(c.diva.to_dict().values()) == {2, "exact"}
    faithful = load(FILES[0].with_name("vitl14.py")).get_config("faithful")
    assert set(faithful.diva.to_dict().values()) == {2, "faithful"}
