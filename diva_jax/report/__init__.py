"""A report on an evaluation or a training run: one HTML file that needs nothing else, and its charts as PNGs.

It reads what `diva_jax.evals` documents. Two more things it shows where they are there:

- a task's weights may have `timesteps` beside `scores` (the diffusion feedback by timestep bin):
  `[{"low": 0, "high": 100, "scores": {METRIC: {"score": 0.2, "interval": [0.1, 0.3]}}}, ...]`;
- rows of metrics.jsonl may have keys `eval/...` and `feedback/...`, with `KEY/low` and `KEY/high` as an interval.
"""

import io

from etils import epath

from diva_jax.common import paths
from diva_jax.common.errors import UserError
from diva_jax.report import inputs, page
from diva_jax.report.charts import Chart


def write(folder: epath.PathLike) -> list[epath.Path]:
    """Writes `report.html` and `report/*.png` into the folder that the numbers are in.

    Args:
      folder: an evaluation's output folder, a training workdir, or both in one.

    Returns:
      The files written, the page first.

    Raises:
      UserError: there is nothing to report on, a file is broken, or the folder can't be written to.
    """
    found = inputs.read(folder)
    body = page.sections(found)
    charts = [part for s in body for part in s.body if isinstance(part, Chart)]
    target, pictures = found.folder / "report.html", found.folder / "report"
    try:
        pictures.mkdir(exist_ok=True)
        written = [target]
        for chart in charts:
            written.append(pictures / f"{chart.name}.png")
            chart.draw(page.HALF if chart.half else page.WIDE).png().save(png := io.BytesIO(), "png")
            written[-1].write_bytes(png.getvalue())
        paths.write_whole(target, page.html(found, body))
    except OSError as e:
        raise UserError(f"{folder}: the report cannot be written ({e}): give a folder that you may write to") from e
    return written
