"""Writes a report on an evaluation or a training run: one self-contained HTML file, and its charts as PNG files.

Beside results.json (see `diva_jax.common.results_schema`) it shows the keys `eval/...` and `feedback/...` of
metrics.jsonl, with `KEY/low` and `KEY/high` as the interval of `KEY`, and images.json, rows of images: `{"title": ...,
"note": ..., "rows": [[{"image": FILE, "caption": ...}, ...], ...]}`.
"""

import os
import re

from etils import epath

from diva_jax.common import paths
from diva_jax.common.errors import UserError, explained
from diva_jax.report import inputs


def write(folder: epath.PathLike) -> list[epath.Path]:
    """Writes `report.html` and `report/*.png` into an evaluation's output folder, a training workdir, or a folder that
    is both, and returns the files, `report.html` first; charts of an earlier report that has others are removed. A
    UserError where there is nothing to report on, a file is invalid, or the folder is not writable."""
    content = inputs.read(folder)
    # Imported here, because matplotlib and jax are slow to import.
    from diva_jax.report import figures, page

    body = page.sections(content)
    charts = page.charts(body)
    target, images = content.folder / "report.html", content.folder / "report"
    if not paths.is_remote(images) and os.path.islink(images):
        raise UserError(f"{images} is a link, through which nothing is written: remove it")
    names: dict[str, int] = {}  # Names of files; those that would be the same get a number.
    for chart in charts:
        safe = re.sub(r"[^\w@=.-]+", "_", chart.name, flags=re.ASCII)[:80].lstrip(".")
        while safe in names:
            names[safe] += 1
            safe = f"{safe}-{names[safe]}"
        names[safe] = 1
    written = [target, *(images / f"{name}.png" for name in names)]
    with explained(f"{folder}: the report cannot be written", "check the permissions of the folder"):
        for path, chart in zip(written[1:], charts, strict=True):
            paths.write_whole(path, chart.png())
        paths.write_whole(target, page.html(content, body).encode("utf-8", "backslashreplace"))
        for path in set(images.glob("*.png")) - set(written):
            if path.is_file() and figures.MADE_BY.encode() in path.read_bytes():
                path.unlink()
    return written
