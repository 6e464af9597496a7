"""Writes a report on an evaluation or a training run: one self-contained HTML file, and its charts as PNG files.

The format of the input is documented in `diva_jax.evals`. Three optional inputs are shown in addition:

- In a task's entry for one set of weights, `timesteps` beside `scores` (the diffusion feedback per timestep bin):
  `[{"low": 0, "high": 100, "scores": {METRIC: {"score": 0.2, "interval": [0.1, 0.3]}}}, ...]`.
- In rows of metrics.jsonl, the keys `eval/...` and `feedback/...`, with `KEY/low` and `KEY/high` as the interval of
  `KEY`.
- The file images.json beside results.json, rows of pictures:
  `{"title": ..., "note": ..., "rows": [[{"image": FILE, "caption": ...}, ...], ...]}`.
"""

import io
import re
from collections.abc import Iterable

from etils import epath

from diva_jax.common import paths
from diva_jax.common.errors import UserError
from diva_jax.report import inputs, page
from diva_jax.report.charts import Chart


def _file_names(names: Iterable[str]) -> list[str]:
    """A file name for each name, which may be any text; names that would be the same get a number."""
    found: dict[str, int] = {}
    for name in names:
        safe = re.sub(r"[^\w@=.-]+", "_", name, flags=re.ASCII)[:80].lstrip(".")
        while safe in found:
            found[safe] += 1
            safe = f"{safe}-{found[safe]}"
        found[safe] = 1
    return list(found)


def write(folder: epath.PathLike) -> list[epath.Path]:
    """Writes `report.html` and `report/*.png` into the folder that holds the results.

    Args:
      folder: an evaluation's output folder, a training workdir, or a folder that is both.

    Returns:
      The paths of the files written: `report.html` first, then one PNG file per chart.

    Raises:
      UserError: there is nothing to report on, a file is invalid, or the folder is not writable.
    """
    found = inputs.read(folder)
    body = page.sections(found)
    charts = [part for s in body for part in s.body if isinstance(part, Chart)]
    target, pictures = found.folder / "report.html", found.folder / "report"
    try:
        pictures.mkdir(exist_ok=True)
        written = [target]
        for name, chart in zip(_file_names(c.name for c in charts), charts, strict=True):
            written.append(pictures / f"{name}.png")
            chart.draw(page.HALF if chart.half else page.WIDE).png().save(png := io.BytesIO(), "png")
            written[-1].write_bytes(png.getvalue())
        paths.write_whole(target, page.html(found, body).encode("utf-8", "backslashreplace"))
    except OSError as e:
        raise UserError(f"{folder}: the report cannot be written ({e}): check the permissions of the folder") from e
    return written
