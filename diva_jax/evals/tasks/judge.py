"""The generator itself as a classifier of texts (arXiv 2303.16203), on the sets of the tasks `choice` and `mmvp`.

For image i and text c, with the same draws of timesteps and noise for all texts of an image, the score is error(i,
neutral text) - error(i, c): the sum over draws of the mean squared error of what the U-Net of `config.diffusion`
predicts, as in the objective `judge`. Without the first term images could not be compared under one text, since some
are harder to denoise than others. What is right is in `diva_jax.evals.stats`, as for the cosines of encoders.

The scores do not depend on the weights that are evaluated: they are computed once, and not compared.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from ml_collections import ConfigDict

from diva_jax.common import fields, log
from diva_jax.common.errors import UserError
from diva_jax.common.fields import at_least, between, choice, field
from diva_jax.data import files, images, preprocess
from diva_jax.evals import Outcome, Settings, encode
from diva_jax.evals.choice_layouts import ImageRegion, Item
from diva_jax.evals.tasks import mmvp
from diva_jax.evals.tasks.choice import PAIRED, Choice, ChoiceOptions, Published
from diva_jax.objectives import judge
from diva_jax.training import workdirs
from diva_jax.training.step import Program
from diva_jax.weights import parts


@dataclasses.dataclass(frozen=True)
class JudgeOptions(ChoiceOptions):
    """The section `config.eval.judge`."""

    draws: int = field(8, "Each image has this many draws of a timestep and noise.", between(1, 2**16))
    first_timestep: int = field(300, "Timesteps are drawn from this one on.", at_least(0))
    end_timestep: int = field(0, "Timesteps are drawn below this one; 0: from all of the schedule.", at_least(0))
    timestep_weight: str = choice(
        ("equal", "nats"), "All timesteps' errors weigh the same (equal), or as they add to the likelihood (nats)."
    )
    neutral: str = field("", "An image's error under a text is compared with that under this one.")


class Judge(Choice):
    """The task on `path`, as the task `choice` has it, or the folder of an MMVP-VLM."""

    title, section_type, task, compared_in_training = "Generator as a judge", JudgeOptions, "judge", False

    def __init__(self, path: str, section: ConfigDict, settings: Settings):
        super().__init__(path, section, settings)
        self.statements, self.texts = self.texts, ()  # No encoder embeds them.
        self._outcome: Outcome | None = None

    def read(self, path: Path, options: JudgeOptions) -> Iterator[tuple[Published, list[Item]]]:
        """As `Choice`, and the pairs of an MMVP-VLM."""
        if path.name != "Questions.csv" and not (path / "Questions.csv").is_file():
            yield from super().read(path, options)
            return
        questions, (patterns, count) = mmvp.read_questions(str(path)), mmvp.read_patterns(str(path))
        items = []
        for n, pair in enumerate(zip(questions[::2], questions[1::2], strict=True)):
            shown, texts = tuple(ImageRegion(q.image) for q in pair), tuple(q.text for q in pair)
            where = f"Questions.csv, lines {pair[0].line} and {pair[1].line}"
            items.append(Item(where, shown, texts, mmvp.OWN, {"pattern": patterns[n // count]}))
        yield Published("Questions.csv", "mmvp", "mmvp", None, PAIRED), items

    def bind(self, config, mesh) -> None:
        """Finds the generator of the config; a UserError where it has none that is conditioned on text alone."""
        if "diffusion" not in config:
            problem = f"the task judge needs a Stable Diffusion model, and config.objective={config.objective} has none"
            raise UserError(f"{problem}: give a config of judge or diva")
        config = config.copy_and_resolve_references().unlock()
        config.objective, config.judge = "judge", fields.config_dict(judge.SECTION)
        for name in ("draws", "first_timestep", "end_timestep", "timestep_weight"):
            config.judge[name] = getattr(self.options, name)
        config.judge.texts = "records"
        config.trainable, config.data.latents = ((".*", 1.0),), ""
        for term in ("anchor", "contrast", "relation"):
            config.get(term, {}).update(weight=0.0)
        self.program, self.mesh = Program(config, mesh, self.workdir), mesh
        diffusion = self.program.objective.diffusion
        tokenize = parts.prompt_tokenizer(diffusion.source, diffusion.text_tokens, diffusion.text_encoder)
        self._ids = tokenize([*self.statements, self.options.neutral])  # The neutral text has the number -1.

        def errors(module, latents, ids, keys):
            return module.errors(latents, ids, module.draw(jax.random.wrap_key_data(keys), latents.shape[1:]))

        self._latents = self.program.jitted(lambda module, pixels: module.latents(preprocess.to_float(pixels)))
        self._errors = self.program.jitted(errors, out_shardings=NamedSharding(mesh, P()))

    def _pixels(self, i: int) -> np.ndarray:
        """The image as the encoder's preprocessing shows it, at the VAE's resolution, uint8 [S, S, 3]."""
        size, spec = self.program.objective.image_size, self.program.objective.spec
        mode, _, side = spec.resize_mode.partition(":")  # The side is in pixels of the encoder.
        mode = f"{mode}:{round(int(side) * size / spec.image_size)}" if side else mode
        return images.prepare(self._read(i), size, mode, spec.interpolation)

    def _keys(self, numbers: Sequence[int]) -> np.ndarray:
        """Key data, one key per image, of the seed and the image's number."""
        key = jax.random.key(self.settings.seed)
        return np.asarray(jax.random.key_data(jax.vmap(partial(jax.random.fold_in, key))(jnp.asarray(numbers))))

    def _all_errors(self, batch: int) -> dict[tuple[int, int], float]:
        """(number of an image, number of a text or -1) -> the error, for every text that an item asks of an image."""
        asked: dict[int, dict[int, None]] = {}
        for items in self.sets.values():
            for of_images, of_texts in map(self.rows_of, items):
                for image in of_images:
                    asked.setdefault(image, {-1: None}).update(dict.fromkeys(of_texts))
        arrays, _ = workdirs.initial_arrays(self.program, every_source=False)
        found, numbers, put = {}, list(asked), partial(encode.spread, mesh=self.mesh)
        bar = log.progress("judging", sum(map(len, asked.values())), "texts of images")
        with bar as progress, ThreadPoolExecutor(files.THREADS) as pool:
            for first in range(0, len(numbers), batch):
                here = numbers[first : first + batch]
                padded = here + here[:1] * (batch - len(here))
                latents = self._latents(arrays, put(list(pool.map(self._pixels, padded))))
                texts, keys = [list(asked[i]) for i in padded], put(self._keys(padded))
                for slot in range(max(map(len, texts))):
                    row = [t[min(slot, len(t) - 1)] for t in texts]
                    errors = np.asarray(self._errors(arrays, latents, put(self._ids[row]), keys))
                    found |= {(i, t): float(e) for i, t, e in zip(here, row, errors, strict=False)}
                    progress.update(sum(slot < len(t) for t in texts[: len(here)]))
        return found

    def answer(self, model):
        """As `Choice`, with the generator's scores in place of cosines."""
        errors = self._all_errors(model.towers.batch)
        encode.require_finite(np.array(list(errors.values())), "the generator", "texts of images", "errors")
        held, rows, further = self.graded(
            lambda of_images, of_texts: np.array([[errors[i, -1] - errors[i, t] for t in of_texts] for i in of_images])
        )
        config, (low, high) = self.program.config, self.program.objective.timestep_range
        note = f"scores of {config.diffusion.source} alone, whatever the weights: {self.options.draws} draws per image"
        return held, rows, further | {"notes": [f"{note} of timesteps {low} to {high - 1}, in {config.dtype}"]}

    def evaluate(self, model) -> Outcome:
        """The same for all weights."""
        self._outcome = done = self._outcome or super().evaluate(model)
        return Outcome(done.results, [{**row, "weights": model.label} for row in done.rows], done.held)

    def compare(self, before: Outcome, after: Outcome) -> dict:
        """Nothing: no score depends on the weights."""
        return {"scores": {}}


SECTION, prepare = JudgeOptions, Judge
