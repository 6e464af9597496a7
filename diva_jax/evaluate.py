"""Evaluates encoders: python -m diva_jax.evaluate --config=configs/vitl14.py --weights=weights/vitl14
--weights=runs/vitl14:4600 --task=mmvp,zeroshot --data=mmvp=data/MMVP_VLM --data=zeroshot=data/imagenet --out=DIR.

A source of weights is anything that training starts from, or a workdir, with `:STEP` for another checkpoint than
the last. The first one is what the others are compared with. `DIR/results.json` and `DIR/predictions.csv` are
described in diva_jax/evals.
"""

import time

from absl import flags
from ml_collections import config_flags

from diva_jax.common import cli, paths
from diva_jax.common.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config file of the backbone.")
_WEIGHTS = flags.DEFINE_multi_string("weights", [], "A source of weights or a workdir[:STEP]; may be repeated.")
_TASK = flags.DEFINE_list("task", [], "Tasks, modules of diva_jax/evals: mmvp,zeroshot,retrieval,drift,feedback.")
_DATA = flags.DEFINE_multi_string("data", [], "TASK=PATH for each task; PATH alone where there is one task.")
_OUT = flags.DEFINE_string("out", None, "Folder for results.json and predictions.csv.")
_TOKENIZER = flags.DEFINE_string("tokenizer", "", "Folder with the tokenizer's files; default: that of the weights.")
_BATCH = flags.DEFINE_integer("batch_size", 64, "Images at once, over all devices; no score depends on it.")
_SEEDS = flags.DEFINE_integer("seeds", 10, "Draws of random patches for a published readout that has some.")
_BOOTSTRAP = flags.DEFINE_integer("bootstrap", 10_000, "Resamples behind each interval.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws and the resamples.")
_IMAGES = flags.DEFINE_integer("images", 256, "feedback: at most so many images, chosen by the seed.")
_DRAWS = flags.DEFINE_integer("draws", 4, "feedback: gradients of independent draws on the same images.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "What the towers compute in: float32 or bfloat16.")
_CLASSES = flags.DEFINE_string("classes", "", "zeroshot: JSON file of class names, or imagenet; default: the data's.")
_TEMPLATES = flags.DEFINE_string("templates", "", "zeroshot: JSON file of prompts; default: the data's or ImageNet's.")
_NEIGHBOURS = flags.DEFINE_integer("neighbours", 10, "drift: k of the kNN overlap.")


def main() -> None:
    config = cli.config_of(_CONFIG)
    if not _WEIGHTS.value:
        raise UserError("--weights is missing: give a source of weights or a workdir, once for each to evaluate")
    if not _OUT.value:
        raise UserError("--out is missing: give a folder for results.json and predictions.csv")
    out = paths.local(_OUT.value, "--out")
    if len(set(_WEIGHTS.value)) < len(_WEIGHTS.value):
        raise UserError("--weights names the same source twice: give each once")
    # Heavy imports come after the flags are known to be right.
    import jax

    from diva_jax import evals
    from diva_jax.evals import encoders, evaluator
    from diva_jax.training import sharding

    options = evals.Options(
        batch_size=_BATCH.value,
        seeds=_SEEDS.value,
        bootstrap=_BOOTSTRAP.value,
        seed=_SEED.value,
        classes=_CLASSES.value,
        templates=_TEMPLATES.value,
        neighbours=_NEIGHBOURS.value,
        images=_IMAGES.value,
        draws=_DRAWS.value,
        dtype=_DTYPE.value,
    )
    mesh = sharding.make_mesh(config.mesh)
    began = time.perf_counter()
    runner = evaluator.Evaluator(config, mesh, evaluator.data_of(_TASK.value, _DATA.value), options, _TOKENIZER.value)
    given = [encoders.resolve(source) for source in _WEIGHTS.value]
    labels, found = evaluator.labels_of(*zip(*given, strict=True)), []
    for label, loaded in encoders.each(given, labels, config, mesh):
        model = runner.model(label, loaded.arrays, loaded.text, loaded.borrowed)
        found.append((label, runner.evaluate(model)))
        del loaded, model  # One set of weights on the devices at a time.
    tasks, rows = runner.report(found)
    if jax.process_index() == 0:
        listed = [{"label": n, "source": s, "step": t} for n, (s, t) in zip(labels, given, strict=True)]
        about = evaluator.about(config, options)
        took = {"seconds": round(time.perf_counter() - began, 1)}
        evaluator.write(out, about | took | {"weights": listed, "tasks": tasks}, rows)
        print(evaluator.table(tasks), flush=True)
        print(f"wrote {_OUT.value}/results.json and predictions.csv in {took['seconds']} s", flush=True)


if __name__ == "__main__":
    cli.run(main)
