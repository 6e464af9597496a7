"""Embeddings do not depend on devices, batch size or run; published readouts are computed as described."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from eval_data import patch
from specs import EVAL_CLIP as CLIP
from specs import EVAL_SIGLIP as SIGLIP

from diva_jax.common.errors import RunError, UserError
from diva_jax.config import default
from diva_jax.evals import Settings, encode, readout
from diva_jax.evals.encoders import Encoder
from diva_jax.models import backbones
from diva_jax.models.backbones import TABLE, Features
from diva_jax.models.backbones.shared.text import Text
from diva_jax.models.layers import Keys
from diva_jax.training import partition, sharding

COUNT = 19


@functools.cache
def arrays_of(build, spec):
    return partition.disassemble(build(spec, rngs=Keys(3)))[1]


@functools.cache
def towers_on(spec, devices: int, batch: int, **settings) -> encode.Towers:
    """Compiled once for all tests."""
    mesh = sharding.make_mesh(default(spec).mesh, jax.devices()[:devices])
    return encode.Towers(spec, mesh, Settings(batch_size=batch, **settings))


def images(spec, devices: int, batch: int, count: int = COUNT, seeds: int = 3, **settings):
    return towers_on(spec, devices, batch, **settings).images(arrays_of(backbones.build, spec), patch, count, seeds)


def embeddings(spec, devices: int, batch: int, open_towers=towers_on):
    towers = open_towers(spec, devices, batch)
    found = towers.images(arrays_of(backbones.build, spec), patch, COUNT, 3)
    ids = np.random.default_rng(0).integers(0, spec.text.vocab_size, (COUNT, spec.text.context_length), np.int32)
    return found | {"texts": towers.texts(arrays_of(Text, spec), ids)}


@pytest.mark.parametrize("spec", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_same_for_any_devices_batch_and_run(spec):
    reference = embeddings(spec, 1, COUNT)
    assert reference["pooled"].shape == (COUNT, spec.embed_dim)
    assert reference["published"].shape == (COUNT, 3 if spec is CLIP else 1, spec.embed_dim)
    for devices, batch in ((1, 7), (8, 1), (8, 64)):
        found = embeddings(spec, devices, batch)
        for key, want in reference.items():
            np.testing.assert_allclose(
                found[key], want, atol=2e-6 * np.abs(want).max(), err_msg=f"{devices} {batch} {key}"
            )
    again = embeddings(spec, 8, 64, open_towers=towers_on.__wrapped__)  # Compiled again.
    assert all((again[k] == found[k]).all() for k in again)


def test_weights_split_over_devices():
    config = default(CLIP)
    config.mesh.update(fsdp=4, min_shard=64)
    mesh = sharding.make_mesh(config.mesh)
    arrays = arrays_of(backbones.build, CLIP)
    shardings = sharding.parameter_shardings(arrays, mesh, 64)
    towers = encode.Towers(CLIP, mesh, Settings(batch_size=5))
    found = towers.images(jax.device_put(arrays, shardings), patch, COUNT)
    want = images(CLIP, 1, COUNT, seeds=0)["pooled"]
    np.testing.assert_allclose(found["pooled"], want, atol=2e-6)


def test_each_image_has_draws_of_its_own():
    few, many = images(CLIP, 8, 16, count=5), images(CLIP, 1, 7)
    np.testing.assert_allclose(few["published"], many["published"][:5], atol=2e-6)
    draws = many["published"]
    assert np.abs(draws[:, 0] - draws[:, 1]).max() > 1e-3 < np.abs(draws[0] - draws[1]).max()
    other = images(CLIP, 1, 7, seed=1)["published"]
    assert np.abs(other - draws).max() > 1e-3


def test_bfloat16():
    exact, rounded = images(CLIP, 1, COUNT)["pooled"], images(CLIP, 1, COUNT, dtype="bfloat16")["pooled"]
    assert 1e-4 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.03


def by_hand(tag: str, cls, patches, drawn):
    """The published readouts, computed from their definitions."""

    def l2(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    if tag.startswith("vitl14"):
        return l2(cls + patches[drawn].mean(0))
    if tag.startswith("metaclip"):
        return l2(l2(cls) + l2(patches).mean(0))
    if tag == "dfn_h14_378":
        return l2(cls) + l2(patches[drawn]).mean(0)
    return l2(cls)


@pytest.mark.parametrize("tag", TABLE)
def test_published_readouts(tag):
    rng = np.random.default_rng(4)
    parsed = readout.parse_readout(TABLE[tag].readout)
    counts = {"vitl14": 76, "vitl14_336": 76, "dfn_h14_378": 364}
    assert parsed.patches == counts.get(tag, 0 if "metaclip" in tag else None)
    p, d, rows, seeds = 30, 7, [5, 11], 4
    features = Features(tokens=rng.standard_normal((2, p, d)) * 3, pooled=rng.standard_normal((2, d)) * 2)
    weights = readout.patch_weights(parsed, p, rows, seeds, seed=9)
    got = np.asarray(readout.read_out(parsed, features, weights))
    assert got.shape == (2, seeds if tag in counts else 1, d)
    for b, row in enumerate(rows):
        for k in range(got.shape[1]):
            drawn = np.random.default_rng((9, k, row)).integers(0, p, parsed.patches or 1)
            want = by_hand(tag, features.pooled[b], features.tokens[b], drawn)
            np.testing.assert_allclose(got[b, k], want, atol=1e-5)


def test_the_pooled_readout_is_the_normalised_embedding():
    features = Features(tokens=np.ones((1, 3, 2)), pooled=np.array([[3.0, 4.0]]))
    np.testing.assert_allclose(readout.read_out(readout.parse_readout("pooled"), features, None), [[[0.6, 0.8]]])


@pytest.mark.parametrize("text", ["mean", "cls + mean(random)", "cls+mean(all)", "l2(cls) + mean(some 3)", ""])
def test_unknown_readouts_are_refused(text):
    with pytest.raises(UserError, match="backbone.readout=.* cannot be read"):
        encode.Towers(dataclasses.replace(CLIP, readout=text), sharding.make_mesh(default(CLIP).mesh), Settings())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_embeddings_that_are_not_finite_are_refused(value):
    mesh = sharding.make_mesh(default(CLIP).mesh, jax.devices()[:1])
    arrays = dict(arrays_of(backbones.build, CLIP))
    arrays["proj/matrix"] = arrays["proj/matrix"].at[0, 0].set(value)
    table, texts = {"a": 0, "b": 1, "c": 2}, np.ones((3, CLIP.embed_dim), np.float32)
    texts[1:, 2] = value
    towers = encode.Towers(CLIP, mesh, Settings(batch_size=4))
    model = encode.Model("run:7", towers, Encoder(arrays, None, "", {}, ""), table, texts)
    with pytest.raises(RunError, match="run:7: the embeddings of 5 of 5 images are not finite"):
        model.images(patch, 5)
    assert model.texts(["a"]).shape == (1, CLIP.embed_dim)
    with pytest.raises(RunError, match="run:7: the embeddings of 2 of 3 texts are not finite"):
        model.texts(["a", "b", "c"])
