"""Data that means something else than it says, or was changed by field and byte: refused with its place, or counted."""

import concurrent.futures
import contextlib
import csv
import io
import json
import multiprocessing
import os

import numpy as np
import pyarrow as pa
import pytest
import trees
from mutations import outcome
from PIL import Image, PngImagePlugin
from records import batches, encoded, saved, tags

from diva_jax.data import files, images, labelled, tables
from diva_jax.data.sources import open_source
from diva_jax.evals import choice_layouts

TEXTS = ["a dog", "a dog, running", 'a "big" dog', '"', "on\ntwo lines", "two,\nlines, three", "1.jpg", "", "a;b|c\td"]


@pytest.mark.parametrize("seed", range(6))
def test_tables_are_what_was_written_or_refused(tmp_path, seed):
    """Rows that a CSV writer quoted come back; without the quotes, or with one more, none comes back otherwise."""
    rng, path = np.random.default_rng(seed), tmp_path / "a.csv"

    def read():
        return [fields for _, fields in files.csv_rows(str(path))]

    for case in range(20):
        order = list(rng.permutation(2))
        rows = [[f"{i}.jpg", TEXTS[rng.integers(len(TEXTS))]] for i in range(int(rng.integers(2, 6)))]
        rows = [[row[k] for k in order] for row in [["image", "caption"], *rows]]
        text = io.StringIO()
        csv.writer(text, delimiter=",;\t|"[case % 4], lineterminator="\n").writerows(rows)
        # With a mark of byte order, and a blank line after the header.
        path.write_text(("\ufeff" * (case % 2)) + text.getvalue().replace("\n", "\n\n", 1), "utf-8")
        assert read() == rows
        bare = "\n".join(",".join(row) for row in rows)
        at = int(rng.integers(bare.index("\n"), len(bare)))
        for changed_text in (bare, bare[:at] + '"' + bare[at:]):
            path.write_text(changed_text)
            found = outcome(read, "a.csv, line ")
            assert found is None or len(found) == len(rows), changed_text


def test_cells_are_paths_unless_urls_are_allowed(tmp_path, caplog):
    (tmp_path / "big.jpg").touch()
    os.truncate(tmp_path / "big.jpg", 2**33)
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "0.png").write_bytes(encoded(3))
    url = f"file://{tmp_path}"
    cells = ["0.png", "big.jpg", "pipe.jpg", f"{url}/0.png", f"{url}/pipe.jpg", "x" * 5000, "", "\0"]
    table = pa.table({"image": cells})
    for allow, good in ((False, {0}), (True, {0, 3})):
        source = tables.TableSource([tables._of_columns(f"{tmp_path}/a.csv", table, ("image", None, None))], allow)
        for i in range(len(cells)):
            if i in good:
                assert source.read(i).image == encoded(3)
            else:
                with pytest.raises((OSError, ValueError)):
                    source.read(i)
    (tmp_path / "a.csv").write_text("image\n" + "\n".join(cells[:4]))
    iterator = batches(tmp_path / "a.csv", batch=4, max_broken_share=1.0)
    assert set(tags(next(iterator)["image"])) == {3} and iterator.decoder.count == 3
    assert "training with data.allow_urls=True fetches them" in caplog.text
    assert max(map(len, caplog.text.splitlines())) < 700


def read_with_flipped_bits(path):
    rng, hf = np.random.default_rng(5), [{"bytes": b"x" * 200, "path": "a"}] * 7
    for columns in ({"image": hf, "text": ["words"] * 7}, {"image": [b"y" * 99] * 7, "text": [["a", "b"]] * 7}):
        trees.change(path.parent, {path.name: columns})
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(200):
            data, bit = whole.copy(), int(rng.integers(8 * len(whole)))
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data.tobytes())
            source = outcome(lambda: open_source(str(path)))
            for i in range(len(source or ())):
                with contextlib.suppress(OSError, ValueError):
                    source.read(i)


def test_flipped_bits_of_arrow_files_end_no_process(tmp_path):
    """In a new process, since a signal would end that of the tests."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(read_with_flipped_bits, tmp_path / "a.arrow").result(120)


def test_caches_of_datasets_and_images_of_other_formats_are_no_records(tmp_path, caplog):
    arrows, pictures = tmp_path / "arrows", tmp_path / "images"
    caches = ("x-train.arrow", "cache-12ab.arrow", "cache-12ab_00000_of_00002.arrow")
    trees.change(arrows, {name: {"image": [encoded(1)]} for name in caches})
    trees.change(pictures, dict.fromkeys(("a/0.png", "a/1.HEIC", "a/2.svg", "b/3.png"), "PNG"))
    for named in ("", "/*.arrow", "/cache-12ab.arrow"):  # Named alone, it is meant.
        assert len(open_source(f"{arrows}{named}")) == 1
    assert len(open_source(str(pictures))) == 2 and "2 images of other formats are not read" in caplog.text
    caplog.clear()
    assert len(labelled.class_folders(pictures)) == 2 and "1.HEIC" in caplog.text


@pytest.mark.parametrize("zipped", [(), (False,), (True,), (True, False)])
def test_pngs_with_large_profiles_and_texts(zipped):
    """Healthy images, whose pixels are those without them."""
    info, profile = PngImagePlugin.PngInfo(), {} if len(zipped) == 1 else {"icc_profile": bytes(3_000_000)}
    for each in zipped:
        info.add_text("workflow", "x" * 80_000_000, zip=each)
    data = saved(Image.open(io.BytesIO(encoded(300))), pnginfo=info, **profile)
    assert images.decode(data).tobytes() == images.decode(encoded(300)).tobytes()


def test_lines_of_json_end_at_newlines_alone(tmp_path):
    """Not at the other characters at which `str.splitlines` ends one, and JSON Lines does not."""
    (tmp_path / "0.jpg").write_bytes(encoded(1))
    words = [f"a{c}b" for c in "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"]
    row = json.dumps({"images": ["0.jpg"], "texts": words}, ensure_ascii=False).encode()
    for end in (b"\n", b"\r\n"):
        (tmp_path / "own.jsonl").write_bytes(end.join([row, row, b""]))
        found = choice_layouts.read_items(tmp_path / "own.jsonl", "own", tmp_path)
        assert [item.texts for item in found] == [tuple(words)] * 2
