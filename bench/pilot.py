"""Prints hours and chip-hours of every published run from the compiler's reports: python bench/pilot.py [--price=1.2].

Times are the step's of `bench/tpu/*.json` (docs/TPU.md has the definitions) plus that of the links, so they are lower
bounds: nobody has run these programs on a TPU, and input, evaluation, compilation and restarts come on top.
"""

import argparse
import json
from pathlib import Path

import tpu
from diva_jax import objectives
from diva_jax.common import config_files

REPORTS = Path(__file__).parent / "tpu"
BEGIN, END = "<!-- table: python bench/pilot.py --docs=docs/PILOT.md -->", "<!-- end of table -->"
# Report of the last stage's step -> config; one without a report has no row. A stage without a report of its own has
# the time of the last one's.
RUNS = {
    **{
        f"{name}-v5e-16": name
        for name in (
            "vitl14", "vitl14_336", "metaclip_l14", "metaclip_h14", "dfn_h14", "dfn_h14_378", "siglip_so400m",
            "siglip_so400m_384", "unclip_vitl14", "genhancer_vitl14", "dcr_vitl14", "kuea_vitl14", "smartclip_vitl14",
            "judge_vitl14", "comclip_vitl14", "salm_vitl14",
        )
    },
    "vitl14-v6e-16": "vitl14",
    "vitl14-v5p-16": "vitl14",
}  # fmt: skip
FIRST_STAGE = {"genhancer_vitl14": "genhancer_vitl14-v5e-16-stage1"}


def step_seconds(report: str, images: int) -> tuple[float, dict]:
    """Seconds of one step of `images` images, and the report. The time is proportional to the images of a step."""
    r = json.loads((REPORTS / f"{report}.json").read_text())
    return (r["step_ms"] * images / r["batch_size"] + r["all_reduce_ms"]) / 1e3, r


def row(report: str, config_name: str, price: float | None) -> list:
    """One row of the table: slice, steps, images per step, hours, chip-hours and, with a price, their cost."""
    config = config_files.read(config_name)
    stages, images = objectives.stages(config), config.batch_size
    seconds, r = step_seconds(report, images)
    steps, hours = stages[-1].end, stages[-1].end * seconds / 3600
    if config_name in FIRST_STAGE:
        hours += stages[0].end * (step_seconds(FIRST_STAGE[config_name], images)[0] - seconds) / 3600
    cells = [config_name, r["topology"], f"{steps:,}", images, f"{hours:.1f}", f"{hours * r['chips']:.0f}"]
    if price is not None:
        cells.append(f"{hours * r['chips'] * price:,.0f}")
    return cells


def table(price: float | None) -> str:
    header = ["config", "slice", "steps", "images per step", "hours", "chip-hours"]
    header += ["cost"] if price is not None else []
    made = {file.stem for file in REPORTS.glob("*.json")}
    return tpu.table(header, [row(report, config, price) for report, config in RUNS.items() if report in made])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--price", type=float, help="of a chip-hour, in any currency")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="write the table between the markers of this file")
    args = parser.parse_args()
    text = table(args.price)
    print(text)
    if args.docs:
        tpu.write_between(args.docs, BEGIN, text, END)


if __name__ == "__main__":
    main()
