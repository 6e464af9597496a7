"""Writes the reference of all config fields: python bench/config_page.py --docs=docs/CONFIG.md.

Values and comments are those of the source; `python -m diva_jax.main --config=FILE --help` prints the same for one
config.
"""

from pathlib import Path

from absl import app, flags

from diva_jax import config, objectives

_DOCS = flags.DEFINE_string("docs", "docs/CONFIG.md", "The page to write.")

_HEAD = """# Fields of a config

<!-- Written by python bench/config_page.py --docs=docs/CONFIG.md -->

A config file (`configs/*.py`) calls `config.default(backbone, diffusion, objective)` and changes what it needs. The
command line changes single fields: `--config.optim.lr=3e-4`. A tuple is written with or without brackets: `0.9,1.0`.
`python -m diva_jax.main --config=FILE --help` prints the fields of one config with the values that they have.

## All objectives

The values are those of `config.default()`: DIVA on OpenAI's ViT-L/14. Other objectives set some of them to their own
recipe, as listed in their sections.
"""


def _table(rows) -> list[str]:
    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    return ["| field | value | |", "|---|---|---|", *(f"| `{f}` | `{cell(v)}` | {cell(c)} |" for f, v, c in rows), ""]


def page() -> str:
    """The content of docs/CONFIG.md."""
    base = config.described(config.default())
    own = objectives.section(config.default().objective)
    general = [row for row in base if not row[0].startswith(f"{own}.")]
    values = {field: value for field, value, _ in general}
    lines = [_HEAD, *_table(general)]
    for name in objectives.names():
        rows = config.described(config.default(objective=name))
        mine = [r for r in rows if r[0].startswith(f"{name}.")]
        lines += [f"## {name}", "", *(_table(mine) if mine else ())]
        changed = [
            (f, v) for f, v, _ in rows if not f.startswith(f"{name}.") and v != values.get(f) and f != "objective"
        ]
        if changed:
            lines += ["Its recipe sets " + ", ".join(f"`{f}={v}`" for f, v in changed) + ".", ""]
    return "\n".join(lines)


def main(_) -> None:
    Path(_DOCS.value).write_text(page())


if __name__ == "__main__":
    app.run(main)
