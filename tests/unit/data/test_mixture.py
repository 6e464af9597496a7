"""Mixtures: exact shares in every epoch, records once before any is repeated, resumed and split as tars are."""

import collections
import logging
from fractions import Fraction

import numpy as np
import pytest
from helpers import refused
from records import batches, encoded, tags, take, write_shards

from diva_jax.common.errors import UserError
from diva_jax.data import mixture
from diva_jax.data.sources import open_source

SIZES = {"tars": 12, "table": 5, "folder": 3}


@pytest.fixture
def folder(tmp_path):
    """Twelve records in tars with the tags 0.., five in a CSV file with 100.., three images with 200.."""
    (tmp_path / "tars").mkdir()
    write_shards(tmp_path / "tars", SIZES["tars"], 5)
    rows = ["image,caption"]
    for i in range(SIZES["table"]):
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / f"{i}.png").write_bytes(encoded(100 + i))
        rows.append(f"files/{i}.png,words {i}")
    (tmp_path / "table.csv").write_text("\n".join(rows))
    for i in range(SIZES["folder"]):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / f"{i}.png").write_bytes(encoded(200 + i))
        (tmp_path / "folder" / f"{i}.txt").write_text("a text")
    return tmp_path


def path_of(folder, *weights):
    names = ("tars", "table.csv", "folder")
    return "mix:" + "; ".join(f"{w}={folder / n}" for w, n in zip(weights, names, strict=False))


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.5, 0.25, 0.25), (6, 3, 1), (12, 5, 3), (".1", "2.", "0.3")])
def test_shares_of_an_epoch(folder, weights):
    source = open_source(path_of(folder, *weights))
    found = collections.Counter(source.locate(i) for i in range(len(source)))
    shares = np.array([sum(n for (part, _), n in found.items() if part == p) for p in range(3)]) / len(source)
    want = np.array([float(w) for w in weights]) / sum(float(w) for w in weights)
    np.testing.assert_allclose(shares, want, atol=0.51 / len(source))
    for part, size in enumerate(SIZES.values()):
        times = [found[part, record] for record in range(size)]
        assert max(times) - min(times) <= 1 and min(times) >= 1
    assert min(found.values()) == 1  # One source has each record once.
    assert source.has_text
    for i in (0, len(source) // 2, len(source) - 1):
        part, record = source.locate(i)
        assert source.read(i) == source.parts[part].read(record) and source.name(i) == source.parts[part].name(record)


def test_order_resume_and_a_broken_record(folder, caplog):
    (folder / "folder" / "1.png").write_bytes(b"broken")
    path, kw = path_of(folder, 2, 1, 1), dict(seed=3, batch=6, max_broken_share=1.0)
    with caplog.at_level(logging.WARNING):
        iterator = batches(path, **kw)
        whole = take(iterator, 12)
    # It is in two slots of each epoch, and counted once.
    assert iterator.broken.count == 1
    assert sum("broken image: 1.png" in r.getMessage() for r in caplog.records) == 1
    seen = [tag for batch in whole[:4] for tag in tags(batch["image"])]
    assert seen != sorted(seen) and set(range(12)) <= set(seen) and 201 not in seen
    resumed = batches(path, process=(1, 3), **kw)
    resumed.set_state({"batches": 5, "seed": 3, "records": 24, "global_batch": 6})
    for batch in whole[5:]:
        np.testing.assert_array_equal(next(resumed)["image"], batch["image"][1::3])


def test_captions_must_be_in_all(folder):
    for text in (folder / "folder").glob("*.txt"):
        text.unlink()
    assert not open_source(path_of(folder, 1, 1, 1)).has_text
    assert open_source(path_of(folder, 1, 1)).has_text


def test_the_start_says_how_often(folder, capsys):
    open_source(path_of(folder, 1, 1, 1))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"{folder}/table.csv: 33.3% of the images: 5, each 2.4 times per epoch"
    open_source(path_of(folder, 1, 1, 1), quiet=True)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("path", ["mix:", "mix:a;b", "mix:1=", "mix:0=a;1=b", "mix:-1=a", "mix:1=a;nan=b", "mix:a=1"])
def test_bad_forms_are_one_sentence(path):
    refused("must read mix:WEIGHT=PATH;WEIGHT=PATH", open_source, path)


def test_bad_parts(folder):
    refused("none.tar' does not exist", open_source, f"mix:1={folder}/tars;1={folder}/none.tar")
    refused("is a mixture in a mixture", open_source, f"mix:1={folder}/tars;1=mix:1={folder}/folder")
    parts = [open_source(str(folder / "tars"))] * 2
    with pytest.raises(UserError, match="an epoch would have 12000000012 images"):
        mixture.MixtureSource(parts, [Fraction(1, 10**9 + 1), Fraction(10**9, 10**9 + 1)], "mix:...")
