"""What `import diva_jax` offers to people who write Python: encoders, losses, and the commands as functions."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diva_jax import config as configs
from diva_jax.api.encoder import Encoder, ImageLike, as_image, as_images, chosen, mapping, named, path, sequence, whole
from diva_jax.common import config_files, fields as declarations, paths
from diva_jax.common.errors import RunError, UserError, brief, explained, listing, printable
from diva_jax.data.images import sample_box
from diva_jax.data.inputs import Example
from diva_jax.data.sources import caption, listed
from diva_jax.evals import Settings, evaluator, results, weight_sets
from diva_jax.models import backbones
from diva_jax.objectives import Progress
from diva_jax.training import loop, partition, workdirs
from diva_jax.training.step import Program, image_keys
from diva_jax.weights import origins
from diva_jax.weights.export import layouts, publish


class Result(NamedTuple):
    """The loss of a batch."""

    loss: float  # The scalar that is differentiated.
    metrics: dict[str, float]  # Name -> value, as the train loop logs them.
    gradients: dict[str, jax.Array]  # Name -> array of the shape and dtype of the parameter.


class Loss:
    """An objective with its weights loaded; `objective` makes one.

    Attributes:
      config: the config.
      inputs: name -> (shape of one example, dtype), what a batch holds.
      params: name -> array of the parameters that some stage of the config trains.
      frozen: name -> array of all others.
    """

    def __init__(self, config: ConfigDict):
        configs.validate(config, 1)
        self.config = config
        self._mesh = partition.make_mesh(config.mesh)
        self._program = Program(config, self._mesh)
        configs.check_used(config, self._program.trained)
        arrays, _ = workdirs.initial_arrays(self._program)
        self.params = {n: arrays[n] for n in self._program.trained}
        self.frozen = {n: arrays[n] for n in self._program.abstract_frozen()}
        self._inputs = self._program.objective.inputs
        self.inputs = {name: (i.shape, i.dtype) for name, i in self._inputs.items()}
        self._make = {name: i.open(config.data) for name, i in self._inputs.items()}
        self._key = jax.random.key_data(jax.random.fold_in(jax.random.key(config.seed), 1))
        self._compute = jax.jit(self._trace)

    @named()
    def batch(
        self, images: Sequence[ImageLike], texts: Sequence[str | Sequence[str]] | None = None, seed: int = 0
    ) -> dict[str, np.ndarray]:
        """Makes a batch, {name: array [B, *shape]}, as the data pipeline does: one random crop of each image at the
        size that each input has. A UserError where an image cannot be read, or texts are missing.

        Args:
          images: what `Encoder.encode_image` takes.
          texts: as many captions, for objectives that read them, or lists of texts that differ in one fact.
          seed: of the crops and of whatever the inputs draw.
        """
        if self.config.data.latents:
            raise UserError("Loss.batch reads no cache: give fields={'data.latents': ''}, for what it holds")
        images, seed = as_images(images), whole("seed", seed)
        texts = [None] * len(images) if texts is None else sequence("texts", texts)
        needing = [name for name, i in self._inputs.items() if i.needs_text]
        if len(texts) != len(images) or (needing and not all(isinstance(t, str) and t.strip() for t in texts)):
            what = listing(needing) or "a batch"
            raise UserError(f"{len(images)} images need as many texts, each a str and none empty, for {what}")
        c, rows = self.config.data.crop, []
        for i, (given, text) in enumerate(zip(images, texts, strict=True)):
            image, rng = as_image(given).convert("RGB"), np.random.default_rng((seed, i))
            box = sample_box(rng, *image.size, tuple(c.scale), tuple(c.ratio))
            one = text is None or isinstance(text, str)
            with explained(f"the texts of image {i} cannot be used", "give others", ValueError):
                example = Example(image, caption(text) if one else None, box, rng, texts=None if one else listed(text))
            for choice in (made.alternatives for made in self._inputs.values() if hasattr(made, "alternatives")):
                if not choice(example, np.random.default_rng(0)):
                    raise UserError(f"image {i} needs {choice.wanted}: give it in texts")
            rows.append({name: make(example) for name, make in self._make.items()})
        return {name: np.stack([row[name] for row in rows]) for name in self._inputs} if rows else {}

    def _trace(self, params, frozen, batch, key, step):
        with self._program.tracing():
            keys = image_keys(key, step, batch["row"])
            p, progress = self._program, ()
            if p.objective.follows_run:
                done = (step - p.stages[-1].start) / p.stages[-1].steps
                progress = (Progress(done, p.skeleton.merge(params, frozen)),)

            def loss(params):
                return p.skeleton.merge(params, frozen).loss(batch, keys, *progress)

            (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params)
            return value, metrics, gradients

    @named()
    def __call__(
        self, batch: Mapping[str, Any], params: Mapping[str, jax.Array] | None = None, step: int = 0
    ) -> Result:
        """Computes the loss of a batch and its gradients with respect to the trained parameters.

        The batch is one micro-batch. With the same config, step and rows the random draws are those of training.
        A UserError where an input or a parameter is missing, or has another shape or dtype.

        Args:
          batch: each input as [B, *shape], B a multiple of the number of devices; optionally "row", int32 [B], the
            rows of the images in the global batch (default 0 to B - 1), from which their random draws follow.
          params: other values than `self.params`, of all its names.
          step: another step has other random draws.
        """
        batch, params = self._checked(batch), self._complete(params)
        batch = jax.device_put(batch, jax.sharding.NamedSharding(self._mesh, partition.BATCH))
        step = jnp.int32(whole("step", step))
        value, metrics, gradients = self._compute(params, self.frozen, batch, self._key, step)
        return Result(float(value), {name: float(v) for name, v in metrics.items()}, gradients)

    def _complete(self, params: Mapping[str, jax.Array] | None) -> dict[str, jax.Array]:
        """All parameters; a UserError where one is missing or unknown, of another shape or not of floats."""
        given = self.params if params is None else mapping("params", params, "Loss.params")
        wrong = [f"lacks {n}" for n in self.params if n not in given]
        wrong += [f"has {n}" for n in given if n not in self.params]
        for name in self.params.keys() & given.keys():
            want, shape, dtype = self.params[name].shape, np.shape(given[name]), getattr(given[name], "dtype", object)
            if shape != tuple(want) or not jnp.issubdtype(dtype, np.floating):
                wrong.append(f"has {name} as {np.dtype(dtype)} {list(shape)} and not as floats {list(want)}")
        if wrong:
            raise UserError(f"params {listing(sorted(wrong), 5)}: give all of Loss.params, with values of your own")
        return given

    @named()
    def towers(self, params: Mapping[str, jax.Array] | None = None) -> dict[str, jax.Array]:
        """Computes the tuned model, with adapters merged: for `Encoder.with_params` and `export`. A UserError where a
        parameter is missing, or has another shape or dtype.

        Args:
          params: other values than `self.params`, of all its names.

        Returns:
          name -> array, of whole towers: "vision/NAME", and where the objective tunes them "text/NAME", "logit_scale"
          and "logit_bias".
        """
        towers = self._program.towers({**self.frozen, **self._complete(params)})
        every = ((tower, name, array) for tower, arrays in towers.items() for name, array in arrays.items())
        return {name if name == tower else f"{tower}/{name}": array for tower, name, array in every}

    def _checked(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        batch = mapping("batch", batch, "Loss.batch(images)")
        wrong = [f"lacks {name}" for name in self.inputs if name not in batch]
        wrong += [f"has {name}, which is no input" for name in batch if name not in (*self.inputs, "row")]
        if wrong:
            inputs = [f"{name} ({dtype} [B, {', '.join(map(str, s))}])" for name, (s, dtype) in self.inputs.items()]
            raise UserError(f"the batch {listing(wrong)}: it must have {listing(inputs)}")
        size, *_ = (*np.shape(batch[next(iter(self.inputs))]), 0)
        arrays = {"row": np.arange(size, dtype=np.int32)} | {name: np.asarray(a) for name, a in batch.items()}
        for name, (shape, dtype) in {**self.inputs, "row": ((), np.dtype(np.int32))}.items():
            if arrays[name].shape != (size, *shape) or arrays[name].dtype != dtype:
                problem = f"the input {name} is {arrays[name].dtype} {list(arrays[name].shape)}"
                raise UserError(f"{problem}: give {dtype} {[size, *shape]}, as Loss.batch makes it from images")
        devices = self._mesh.size
        if not size or size % devices:
            raise UserError(f"a batch of {size} cannot be split over {devices} devices: give a multiple of {devices}")
        return arrays


__all__ = ["Encoder", "Loss", "evaluate", "export", "load", "objective", "train"]

Config = ConfigDict | str | os.PathLike


def read_config(config: Config, fields: Mapping[str, Any] | None = None) -> ConfigDict:
    """Returns a config (a result of `config.default`, which is not changed, a config file or its name, such as
    "vitl14:faithful") with other values of some fields, by dotted path as in flags: {"optim.lr": 3e-4}. A UserError
    where there is no such config or field."""
    if not isinstance(config, ConfigDict | str | os.PathLike):
        raise UserError(f"config={brief(config)} is no config: give a result of config.default, a file or a name")
    copied = config.copy_and_resolve_references() if isinstance(config, ConfigDict) else config_files.read(config)
    fields = mapping("fields", fields, '{"optim.lr": 3e-4}')
    fields = declarations.flatten(fields, configs.declared(copied.objective))
    declarations.require(copied, fields)
    wrong = (KeyError, TypeError, ValueError, AttributeError)
    with explained(f"fields={fields!r} do not fit the config", "give values of the fields' types", *wrong):
        copied.update_from_flattened_dict(fields)
    config_files.trust(copied.to_dict())
    return copied.lock()


@named()
def load(
    source: str | os.PathLike, *, spec: backbones.Spec | str | None = None, batch_size: int = 64, dtype: str = "float32"
) -> Encoder:
    """Loads an encoder onto the devices of this process. A UserError where the source is invalid or is not of `spec`.

    Args:
      source: the workdir of a run, `WORKDIR:STEP` for another checkpoint than the last, or any source of weights: an
        open_clip, OpenAI or transformers file or folder, a hub id.
      spec: for a bare file that does not say what it is: a row of `backbones.TABLE` such as "vitl14", or a Spec.
      batch_size: the largest number of images or texts that are computed at once.
      dtype: compute type, "float32" or "bfloat16".
    """
    declarations.check({"batch_size": batch_size, "dtype": dtype}, declarations.declared(Settings), "load")
    configs.check_runs([source := path("source", source)])
    source, step, _ = origins.find(source, "source")
    if step is not None:
        config = workdirs.read_config(source)
        if spec is not None:
            raise UserError("spec is for weights without a description: leave it out for a run, which has a config")
    else:
        if spec is not None and not isinstance(spec, backbones.Spec):
            chosen("spec", spec, [*backbones.TABLE])
        config = configs.default(spec or origins.open_source(source, "source").described(source))
    with config.unlocked():
        # All devices of this machine, not those of the run.
        config.mesh.data, config.mesh.fsdp = -1, 1
    return Encoder(source, step, config, batch_size, dtype)


@named()
def objective(config: Config, fields: Mapping[str, Any] | None = None) -> Loss:
    """Loads an objective with its weights: the loss that `train` minimises, and its gradients. A UserError where the
    config is not valid, or weights are missing.

    Args:
      config: a result of `config.default`, or a config file.
      fields: dotted path of a field -> value, see `read_config`.
    """
    return Loss(read_config(config, fields))


@named()
def train(
    config: Config, workdir: str | os.PathLike, *, fields: Mapping[str, Any] | None = None, init_from: str | None = None
) -> str:
    """Trains, or resumes from the last checkpoint in the workdir, and returns the workdir.

    Args:
      config: a result of `config.default`, or a config file.
      workdir: the folder for checkpoints, metrics and the config.
      fields: dotted path of a field -> value, see `read_config`.
      init_from: WORKDIR or WORKDIR:STEP of another run, see `loop.Run`.

    Raises:
      UserError: the config, the data, the weights or the workdir is invalid.
      RunError: the run failed, see `loop.Run.run`.
      KeyboardInterrupt: SIGTERM or the first SIGINT came; the run is saved, and the same call resumes it.
    """
    workdir = path("workdir", workdir)
    run = loop.Run(read_config(config, fields), workdir, init_from and path("init_from", init_from))
    if not run.run():
        raise KeyboardInterrupt(f"saved; the same call resumes {workdir}")
    return workdir


@named()
def evaluate(
    config: Config,
    weights: str | Sequence[str],
    data: Mapping[str, str],
    *,
    out: str | os.PathLike | None = None,
    fields: Mapping[str, Any] | None = None,
    control: str = "",
    best: bool = False,
) -> dict[str, Any]:
    """Returns the content of results.json for sets of weights, the first of which every other is compared with.

    Args:
      config: the config of the backbone: a result of `config.default`, or a config file.
      weights: sources of weights or workdirs[:STEP], or "NAME=WORKDIR,WORKDIR": runs that differ in their seed.
      data: task -> where its data is, see docs/EVALUATION.md.
      out: a folder for results.json and predictions.csv, from which `report.write` makes a page; None for no files.
      fields: dotted path of a field -> value, such as {"eval.batch_size": 32}.
      control: one of the weights, not the first, tuned with a signal that can teach nothing: the others are compared
        with it too; of a group its name.
      best: whether the best of several checkpoints of one run is named, with what the best would be by chance.

    Raises:
      UserError: the config, weights or data are invalid.
      RunError: embeddings are not finite, or a checkpoint was removed meanwhile; the scores of other weights are
        written, and printed, before.
    """
    weights = [path("weights", source) for source in sequence("weights", weights, str | os.PathLike)]
    if not weights:
        raise UserError("weights is empty: give one source or more")
    data = mapping("data", data, "{'mmvp': 'data/MMVP_VLM'}")
    if not data:
        raise UserError("data is empty: give {task: path}, e.g. {'mmvp': 'data/MMVP_VLM'}")
    if out is not None:  # Before anything is evaluated, which may take hours.
        paths.check_writable(out := paths.local(path("out", out), "--out"), "--out")
    configs.check_runs(source for given in weights for source in weight_sets.parse(given)[1])
    data = {task: path(f"data[{task!r}]", place) for task, place in data.items()}
    summary, rows, failed = evaluator.run(read_config(config, fields), weights, data, control, best)
    incomplete = RunError("; ".join(failed)) if failed else None
    try:
        if out is not None and jax.process_index() == 0:
            results.write(out, summary, rows)
    except UserError as e:  # The disk may be full now.
        incomplete = e
    if incomplete:  # What was measured is not lost.
        if jax.process_index() == 0:
            print(printable(results.table(summary)), flush=True)
        raise incomplete
    return summary


@named(*(f.name for f in dataclasses.fields(publish.ExportOptions)))
def export(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    format: str = "open_clip",
    step: int | None = None,
    dtype: str = "float32",
    params: Mapping[str, Any] | None = None,
    **options: Any,
) -> str:
    """Exports a run, or converts weights of any supported format, and returns the folder.

    Args:
      source: the workdir of a run, or a source of weights that describes itself.
      out: the folder to write; it must not exist or be empty.
      format: "open_clip", "hf" (transformers, LLaVA) or "pt" (the vision tower's state dict).
      step: of the run's checkpoint; default the newest.
      dtype: of the exported weights, "float32", "float16" or "bfloat16".
      params: other values of the source's towers, those of a loop of one's own: what `Loss.towers` returns.
      **options: of `export.publish.ExportOptions`: the card's license and scores, the hub's repository.

    Raises:
      UserError, RunError: as `export.layouts.export`.
    """
    source, out = path("source", source), path("out", out)
    chosen("format", format, layouts.FORMATS)
    chosen("dtype", dtype, layouts.DTYPES)
    run = origins.as_run(source)
    if step is not None and (run is None or run[1] is not None):
        raise UserError(f"step={step} is for the workdir of a run without a step, which {source} is not: leave it out")
    if run is not None:
        source, step = run[0], run[1] if step is None else whole("step", step)
    if params is not None:
        params = mapping("params", params, "Loss.towers()")
        if run is not None or options.get("results"):
            problem = "params are for a source that is no run, and have no results"
            advice = "give the weights that the loop began with, Loss.config.backbone.source, and leave out results"
            raise UserError(f"{problem}: {advice}")
    configs.check_runs([source])
    given = publish.ExportOptions(**{name: path(name, value) for name, value in options.items() if value})
    publish.export(source, out, format, dtype, given, run=run is not None, step=step, params=params)
    return out
