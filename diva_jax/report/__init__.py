"""Writes a report on an evaluation or a training run: one self-contained HTML file, and its charts as PNG files.

Beside results.json (see `diva_jax.common.results_schema`) it shows the keys `eval/...` and `feedback/...` of
metrics.jsonl, with `KEY/low` and `KEY/high` as the interval of `KEY`, and images.json, rows of images: `{"title": ...,
"note": ..., "rows": [[{"image": FILE, "caption": ...}, ...], ...]}`.
"""

import os
import re
from collections.abc import Iterable

from etils import epath

from diva_jax.common import paths
from diva_jax.common.errors import UserError
from diva_jax.report import inputs


def _file_names(names: Iterable[str]) -> list[str]:
    """A file name for each name, which may be any text; names that would be the same get a number."""
    counts: dict[str, int] = {}
    for name in names:
        safe = re.sub(r"[^\w@=.-]+", "_", name, flags=re.ASCII)[:80].lstrip(".")
        while safe in counts:
            counts[safe] += 1
            safe = f"{safe}-{counts[safe]}"
        counts[safe] = 1
    return list(counts)


def write(folder: epath.PathLike) -> list[epath.Path]:
    """Writes `report.html` and `report/*.png` into an evaluation's output folder, a training workdir, or a folder that
    is both, and returns the files, `report.html` first. A UserError where there is nothing to report on, a file is
    invalid, or the folder is not writable."""
    content = inputs.read(folder)
    # Imported here, because matplotlib and jax are slow to import.
    from diva_jax.report import page

    body = page.sections(content)
    charts = page.charts(body)
    target, images = content.folder / "report.html", content.folder / "report"
    if not paths.is_remote(images) and os.path.islink(images):
        raise UserError(f"{images} is a link, through which nothing is written: remove it")
    written = [target, *(images / f"{name}.png" for name in _file_names(c.name for c in charts))]
    try:
        for path, chart in zip(written[1:], charts, strict=True):
            paths.write_whole(path, chart.png())
        paths.write_whole(target, page.html(content, body).encode("utf-8", "backslashreplace"))
    except OSError as e:
        raise UserError(f"{folder}: the report cannot be written ({e}): check the permissions of the folder") from e
    return written
