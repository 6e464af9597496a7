"""Training from a cache of latents equals training without it; making a cache can be ended and resumed."""

import hashlib
import shutil
from unittest import mock

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from e2e_config import get_config
from helpers import failed, refused, rounded
from places import SUPPORT

from diva_jax.data import latent_cache, pipeline, preprocess
from diva_jax.training import cache_builder, loop, step
from diva_jax.world import models, records

CROPS = 2
ROUNDING = 2.0**-8  # Relative, of bfloat16.


def run_config(files, cache="", **fields):
    first = dict(steps=4, accum=1, condition__warmup_steps=0, data__latents=str(cache))
    return small.with_fields(get_config(str(files)), first | fields)


@pytest.fixture(scope="module")
def cache(files, home):
    """Two crops of each of the 24 photographs, in shards of five."""
    cache_builder.Builder(run_config(files), str(home), CROPS, per_shard=5, batch=1).run()
    return home


def hashes(folder) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_crops_and_moments_are_those_of_a_run_without(files, cache):
    """Over the first epochs of the same seed; then the crops repeat."""
    plain, cached = run_config(files), run_config(files, cache)
    module = step.Program(plain, small.partition.make_mesh(plain.mesh)).objective
    p = small.program(plain)
    vae = [n for n in p.arrays if n.startswith("vae/")]
    arrays, _ = cache_builder.workdirs.initial_arrays(p, vae, every_source=False)
    absent = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in p.arrays.items()}
    moments = jax.jit(lambda x: p.skeleton.merge(absent, arrays).moments(preprocess.to_float(x)))
    q = small.program(cached)
    assert set(p.arrays) - set(q.arrays) == set(vae)
    assert set(q.objective.pretrained()) == set(module.pretrained()) - {"vae"}
    opened = cache_builder.open_cache(q)
    kw = dict(seed=plain.seed, global_batch=8)
    ours = pipeline.Batches(cached.data, q.objective.inputs, cache=opened, **kw)
    theirs = pipeline.Batches(plain.data, p.objective.inputs, **kw)
    first = {}
    for number in range(9):
        a, b = next(ours), next(theirs)
        if number < 6:
            np.testing.assert_array_equal(a["image"], b["image"])
        rounded(a["moments"], moments(a["image"]), ROUNDING, 1e-5)
        if number < 3:
            first |= {image.tobytes(): m for image, m in zip(a["image"], a["moments"], strict=True)}
        if number >= 6:
            assert all((first[i.tobytes()] == m).all() for i, m in zip(a["image"], a["moments"], strict=True))


SLOW = pytest.param("unclip", marks=pytest.mark.slow), pytest.param("judge", marks=pytest.mark.slow)


@pytest.mark.parametrize("objective", ["diva", "genhancer", *SLOW])
def test_the_loss_of_an_objective_is_that_of_its_own_moments(objective):
    """In float32, with moments that the cache's format holds exactly, the two losses are equal."""
    make = getattr(small, f"{objective}_config")
    p, q = small.program(make()), small.program(make(data__latents="somewhere"))
    assert p.objective.latent_source.shape == q.objective.inputs["moments"].shape
    arrays, keys = small.random_arrays(p), jax.random.split(jax.random.key(3), 8)
    batch = {n: a for n, a in small.batch(p, 0).items() if n != "row"}
    held = np.dtype(latent_cache.DTYPE)

    def without(arrays):
        module = p.skeleton.merge(arrays)
        exact = module.moments
        object.__setattr__(module, "moments", lambda x: exact(x).astype(held).astype(jnp.float32))
        return module.loss(batch, keys)[0]

    def within(arrays):
        moments = p.skeleton.merge(arrays).moments(preprocess.to_float(batch["image"])).astype(held)
        return q.skeleton.merge({n: arrays[n] for n in q.arrays}).loss({**batch, "moments": moments}, keys)[0]

    a, b = jax.jit(lambda w: (without(w), within(w)))(arrays)
    np.testing.assert_allclose(a, b, rtol=2e-6)
    flops = [x.flops()["vae"] for x in (p, q)]
    assert flops[0] > 0 == flops[1]


def test_a_cache_is_made_again_bit_identically_where_a_shard_is_missing(files, cache, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    (copy / "00001-of-00005.array_record").unlink()
    (copy / "00003-of-00005.array_record").write_bytes(b"")
    (copy / "00003-of-00005.array_record.12345678.tmp").write_bytes(b"left by a killed process")
    cache_builder.Builder(run_config(files), str(copy), CROPS, per_shard=5, batch=1).run()
    assert "2 of this process's 5 shards are to be made" in capsys.readouterr().out and hashes(copy) == hashes(cache)


def test_each_process_writes_its_own_shards(files, cache, tmp_path, monkeypatch):
    """Simulated in one process: the shards of two processes together are those of one."""
    monkeypatch.setattr(cache_builder.distributed, "check_same", lambda facts: None)
    for index in range(2):
        monkeypatch.setattr(cache_builder.jax, "process_index", lambda index=index: index)
        monkeypatch.setattr(cache_builder.jax, "process_count", lambda: 2)
        builder = cache_builder.Builder(run_config(files), str(tmp_path), CROPS, per_shard=5, batch=1)
        assert list(builder.mine) == [[0, 2, 4], [1, 3]][index]
        builder.run()
        assert len(list(tmp_path.glob("*.array_record"))) == [3, 5][index]
    assert hashes(tmp_path) == hashes(cache)


def test_the_command_makes_the_same_cache(files, cache, tmp_path):
    """On one device, where sums are rounded otherwise."""
    flags = [f"--config={SUPPORT}/e2e_config.py:{files}", f"--out={tmp_path}", "--crops=2", "--per_shard=5"]
    commands.succeed("cache_latents", *flags, "--batch_size=8", "--config.data.threads=1")
    facts = latent_cache.Manifest.read(cache, "").facts
    ours, theirs = (latent_cache.Cache(str(folder), facts) for folder in (tmp_path, cache))
    for record in range(24):
        a, b = ours.read(record, 1), theirs.read(record, 1)
        assert a.box == b.box and a.image_crc == b.image_crc
        rounded(a.moments, b.moments, 2 * ROUNDING, 1e-5)


GONE = {"comclip": {"anchor", "contrast", "relation"}, "salm": {"teacher"}, "judge": {"anchor", "vae"}}


@pytest.mark.parametrize("objective", GONE)
def test_outputs_of_frozen_models_are_cached(objective, tmp_path):
    """In the world: the same batches, and losses that differ by rounding, without the models."""

    def configured(kind="biased", cache="", **fields):
        c = models.base_config(objective)
        c.update(steps=2, batch_size=6)
        c.data.path, c.data.crop.scale, c.data.latents = records.path(3, kind, 10), (0.5, 0.9), cache
        return small.with_fields(c, fields)

    out = str(tmp_path / "out")
    cache_builder.Builder(configured(), out, 1, per_shard=4, batch=3).run()
    p, q = small.program(configured()), small.program(configured(cache=out))
    assert {n.split("/")[0] for n in set(p.arrays) - set(q.arrays)} == GONE[objective]
    arrays, _ = cache_builder.workdirs.initial_arrays(p)
    arrays |= {n: a + 0.02 * np.sin(np.arange(a.size).reshape(a.shape)) for n, a in arrays.items() if n in p.trained}
    found = []
    for program in (p, q):
        wanted, cache = program.objective.inputs, cache_builder.open_cache(program)
        batch = next(pipeline.Batches(program.config.data, wanted, seed=0, global_batch=6, cache=cache))
        keys, mine = jax.random.split(jax.random.key(3), 6), {n: arrays[n] for n in program.arrays}
        loss = jax.jit(lambda a, b, k, s=program.skeleton: s.merge(a).loss(b, k)[1])
        found.append((batch, {n: float(v) for n, v in loss(mine, batch, keys).items()}))
    (plain, want), (cached, got) = found
    np.testing.assert_array_equal(cached["image"], plain["image"])
    assert got.keys() == want.keys() and all(want[n] > 1e-6 for n in {"loss"} | GONE[objective] & want.keys())
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=0.05, err_msg=name)
    if objective == "comclip":
        other = cache_builder.Builder(configured("rich"), out, 1, per_shard=4, batch=3)
        refused("holds another cache .*another image or caption there.*: use another folder", other.run)
        other = small.program(configured(cache=out, dtype="bfloat16"))
        refused(r"made with other settings: anchor\.dtypes", cache_builder.open_cache, other)
        there, other = models.base_config(objective).backbone.source, tmp_path / "words"
        shutil.copytree(there, other)
        (other / "merges.txt").write_text(f"{(other / 'merges.txt').read_text()}\n")
        other = small.program(configured(cache=out, **{"contrast.tokenizer": str(other)}))
        refused(r"made with other settings: contrast\.tokenizer", cache_builder.open_cache, other)


def test_what_is_refused(files, cache, tmp_path, monkeypatch):
    def build(out=tmp_path, per_shard=5, crops=CROPS, **fields):
        return cache_builder.Builder(run_config(files, **fields), str(out), crops, per_shard, 1)

    refused(r"facts\.crop\.interpolation .*bicubic.*bilinear", build, cache, data__crop__interpolation="bilinear")
    refused(r"holds another cache: crops \(2 there, 3 here\)", build, cache, crops=3)
    refused("leave it empty", build, data__latents="somewhere")
    refused("a folder on this machine", build, "gs://bucket/latents")
    (tmp_path / "file").write_text("")
    refused("cannot be written", lambda: build(tmp_path / "file" / "out").run())
    builder = build(tmp_path / "small")
    monkeypatch.setattr(cache_builder.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 10**3))
    refused(r"GiB are free there", builder.run)
    monkeypatch.undo()
    full = mock.Mock(side_effect=OSError("write() failed: No space left on device"))
    monkeypatch.setattr(cache_builder, "write_shard", full)
    failed(r"00000-of-00005.* cannot be written .*No space left.* the same command", builder.run)
    run = loop.Run(run_config(files, cache), tmp_path / "good")
    assert f"latents from {cache}" in run.describe() and "random weights" not in run.describe()
    with mock.patch.object(type(run.program.objective), "pretrained", lambda self: {}):
        assert "note: vision begins with random weights" in run.describe()
    run.batches.close()
    says = r"made with other settings: dtype \('float32' there, 'bfloat16' here\)"
    refused(says, loop.Run, run_config(files, cache, dtype="bfloat16"), tmp_path / "run")
    refused("kuea has no frozen model", cache_builder.Builder, small.kuea_config(), str(tmp_path), 1, 5, 1)
    assert not (tmp_path / "run").exists()
