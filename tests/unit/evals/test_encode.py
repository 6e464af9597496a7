"""Embeddings do not depend on devices, batch size or run; published readouts are computed as described."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from eval_data import patch, unit
from helpers import failed
from specs import EVAL_CLIP as CLIP
from specs import EVAL_SIGLIP as SIGLIP

from diva_jax.common.errors import RunError, UserError
from diva_jax.config import default
from diva_jax.evals import Settings, encode
from diva_jax.evals.encode import Encoder
from diva_jax.models import backbones
from diva_jax.models.backbones import TABLE, Features
from diva_jax.models.backbones.shared.transformer import Text
from diva_jax.models.layers import Keys
from diva_jax.training import partition

COUNT = 19
WINDOWS = [np.asarray(patch(i).resize((42, 42))) for i in range(5)]


@functools.cache
def arrays_of(build, spec):
    return partition.disassemble(build(spec, rngs=Keys(3)))[1]


@functools.cache
def towers_on(spec, devices: int, batch: int, **settings) -> encode.Towers:
    """Compiled once for all tests."""
    mesh = partition.make_mesh(default(spec).mesh, jax.devices()[:devices])
    return encode.Towers(spec, mesh, Settings(batch_size=batch, **settings))


def images(spec, devices: int, batch: int, count: int = COUNT, seeds: int = 3, **settings):
    return towers_on(spec, devices, batch, **settings).images(arrays_of(backbones.build, spec), patch, count, seeds)


def embeddings(spec, devices: int, batch: int):
    towers = towers_on(spec, devices, batch)
    ids = np.random.default_rng(0).integers(0, spec.text.vocab_size, (COUNT, spec.text.context_length), np.int32)
    out = images(spec, devices, batch) | {"texts": towers.texts(arrays_of(Text, spec), ids)}
    if spec is CLIP:
        tokens = towers.dense(arrays_of(backbones.build, spec), WINDOWS.__getitem__, len(WINDOWS), "clearclip")
        out["dense"] = np.stack(list(tokens))
    return out


@pytest.mark.parametrize("spec", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_same_for_any_devices_and_batch(spec):
    reference = embeddings(spec, 1, 7)
    assert reference["pooled"].shape == (COUNT, spec.embed_dim)
    assert reference["published"].shape == (COUNT, 3 if spec is CLIP else 1, spec.embed_dim)
    for key, found in embeddings(spec, 8, 16).items():
        np.testing.assert_allclose(found, reference[key], atol=2e-6 * np.abs(reference[key]).max(), err_msg=key)
    if spec is CLIP:
        assert reference["dense"].shape == (5, 9, CLIP.embed_dim)


def test_draws_of_each_image_and_rounding():
    few, many = images(CLIP, 8, 16, count=5), images(CLIP, 1, 7)
    np.testing.assert_allclose(few["published"], many["published"][:5], atol=2e-6)
    draws = many["published"]
    assert np.abs(draws[:, 0] - draws[:, 1]).max() > 1e-3 < np.abs(draws[0] - draws[1]).max()
    other = images(CLIP, 1, 7, seed=1)["published"]
    assert np.abs(other - draws).max() > 1e-3
    exact, rounded = images(CLIP, 1, 7)["pooled"], images(CLIP, 1, 7, seeds=0, dtype="bfloat16")["pooled"]
    assert 1e-4 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.03


def by_hand(tag: str, cls, patches, drawn):
    """The published readouts, computed from their definitions."""
    if tag.startswith("vitl14"):
        return unit(cls + patches[drawn].mean(0))
    if tag.startswith("metaclip"):
        return unit(unit(cls) + unit(patches).mean(0))
    if tag == "dfn_h14_378":
        return unit(cls) + unit(patches[drawn]).mean(0)
    return unit(cls)


@pytest.mark.parametrize("tag", TABLE)
def test_published_readouts(tag):
    rng = np.random.default_rng(4)
    parsed = encode.parse_readout(TABLE[tag].readout)
    counts = {"vitl14": 76, "vitl14_336": 76, "dfn_h14_378": 364}
    assert parsed.patches == counts.get(tag, 0 if "metaclip" in tag else None)
    p, d, rows, seeds = 30, 7, [5, 11], 4
    features = Features(tokens=rng.standard_normal((2, p, d)) * 3, pooled=rng.standard_normal((2, d)) * 2)
    weights = encode.patch_weights(parsed, p, rows, seeds, seed=9)
    got = np.asarray(encode.read_out(parsed, features, weights))
    assert got.shape == (2, seeds if tag in counts else 1, d)
    for b, row in enumerate(rows):
        for k in range(got.shape[1]):
            drawn = np.random.default_rng((9, k, row)).integers(0, p, parsed.patches or 1)
            want = by_hand(tag, features.pooled[b], features.tokens[b], drawn)
            np.testing.assert_allclose(got[b, k], want, atol=1e-5)


def test_unknown_readouts_are_refused():
    for text in ("mean", "cls + mean(random)", "cls+mean(all)", "l2(cls) + mean(some 3)", ""):
        with pytest.raises(UserError, match="backbone.readout=.* cannot be read"):
            encode.Towers(dataclasses.replace(CLIP, readout=text), partition.make_mesh(default(CLIP).mesh), Settings())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_embeddings_that_are_not_finite_are_refused(value):
    arrays = dict(arrays_of(backbones.build, CLIP))
    arrays["proj/matrix"] = arrays["proj/matrix"].at[0, 0].set(value)
    table, texts = {"a": 0, "b": 1, "c": 2}, np.ones((3, CLIP.embed_dim), np.float32)
    texts[1:, 2] = value
    model = encode.Model("run:7", towers_on(CLIP, 1, 7), Encoder(arrays, None, "", {}, ""), table, texts)
    failed("run:7: the embeddings of 5 of 5 images are not finite", model.images, patch, 5, seeds=3)
    with pytest.raises(RunError, match="run:7: the embeddings of 9 of 9 patches of a window are not finite"):
        next(model.dense(WINDOWS.__getitem__, 5, "clearclip"))
    assert model.texts(["a"]).shape == (1, CLIP.embed_dim)
    failed("run:7: the embeddings of 2 of 3 texts are not finite", model.texts, ["a", "b", "c"])
