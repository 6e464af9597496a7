"""Writes a report on a run or an evaluation as an HTML page: python -m diva_jax.report DIR.

DIR is the --out folder of diva_jax.evaluate or a training workdir. The report is written to DIR/report.html and
DIR/report/*.png.
"""

import functools

from diva_jax import report
from diva_jax.common import cli


def main(folder: str) -> None:
    """Writes the report and prints the path of the page."""
    page, *charts = report.write(folder)
    print(f"Wrote {page} and {len(charts)} charts in {page.with_suffix('')}.")


entry = functools.partial(cli.run, main, ("DIR",))

if __name__ == "__main__":
    entry()
