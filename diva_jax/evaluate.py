"""Evaluates encoders: python -m diva_jax.evaluate --config=configs/vitl14.py --weights=weights/vitl14
--weights=runs/vitl14:4600 --task=mmvp,zeroshot --data=mmvp=data/MMVP_VLM --data=zeroshot=data/imagenet --out=DIR.

A source of weights is any source that training can start from, or a workdir, with `:STEP` for another checkpoint than
the last; NAME=WORKDIR,WORKDIR,WORKDIR is a group of runs that differ in their seed, shown as one. The first one is
compared with each of the others. Options are fields of the config:
--config.eval.batch_size=32 for all tasks, --config.eval.mmvp.seeds=5 for one. docs/EVALUATION.md describes the options
and the files that are written to DIR.
"""

import functools

import jax
from absl import flags

from diva_jax import api, config as configs
from diva_jax.common import cli
from diva_jax.common.errors import UserError, printable
from diva_jax.evals import evaluator, results

_CONFIG = cli.define_config("The config file of the backbone; --config.eval.FIELD=VALUE sets an option.")
_WEIGHTS = flags.DEFINE_multi_string(
    "weights", [], "A source of weights, a workdir[:STEP], or NAME=WORKDIR,WORKDIR: runs of other seeds; repeatable."
)
_CONTROL = flags.DEFINE_string(
    "control",
    "",
    "One of --weights, not the first, tuned with a signal that can teach nothing: the others are compared "
    "with it too, and the report says where they are not better.",
)
_BEST = flags.DEFINE_bool("best", False, "Name a run's best checkpoint, with how good the best would be by chance.")
_TASK = flags.DEFINE_list("task", [], "Modules of diva_jax.evals.tasks, such as mmvp,choice, or dotted paths.")
_DATA = flags.DEFINE_multi_string("data", [], "TASK=PATH, repeatable; PATH suffices if there is one task.")
_OUT = flags.DEFINE_string("out", None, "Folder for results.json and predictions.csv.")
cli.define_trust()


def main() -> None:
    config = cli.config_of(_CONFIG)
    if not _WEIGHTS.value:
        raise UserError("--weights is missing: give a source of weights or a workdir, once for each to evaluate")
    if not _OUT.value:
        raise UserError("--out is missing: give a folder for results.json and predictions.csv")
    data = evaluator.data_of(_TASK.value, _DATA.value)
    summary = api.evaluate(config, _WEIGHTS.value, data, out=_OUT.value, control=_CONTROL.value, best=_BEST.value)
    if jax.process_index() == 0:
        print(printable(results.table(summary)), flush=True)
        print(f"wrote {_OUT.value}/results.json and predictions.csv in {summary['seconds']} s", flush=True)


entry = functools.partial(cli.run, main, described=configs.described)

if __name__ == "__main__":
    entry()
