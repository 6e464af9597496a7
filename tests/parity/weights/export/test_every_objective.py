"""The export of each objective's run, in open_clip and transformers: the embeddings that the run's evaluation computes.

Nothing is trained: the checkpoint has random values in place of what the objective trains.
"""

import dataclasses

import jax
import numpy as np
import open_clip
import pytest
import small
from eval_data import patch
from exports import written_by_open_clip
from helpers import close
from specs import CLIP_FOLDER, DINOV2

from diva_jax import config as configs
from diva_jax.data import images
from diva_jax.data.preprocess import normalise, to_float
from diva_jax.evals import Settings, encode
from diva_jax.models import backbones
from diva_jax.training import checkpoint, load, workdirs
from diva_jax.training.step import averaged
from diva_jax.weights import origins, readers, runs
from diva_jax.weights.export import layouts, reference

# Both libraries can hold it, and the objectives' autoencoders halve its sides.
SPEC = dataclasses.replace(CLIP_FOLDER, image_size=28, patch_size=7, select="random:5")
COUNT, STEP, TOKENS = 3, 5, 17
# Objective -> whether its run keeps a moving average.
RUNS = {"diva": True, "unclip": False, "genhancer": True, "dcr": False, "kuea": True, "smartclip": True}
RUNS |= {"comclip": False, "salm": True, "judge": False}
LORA = ("genhancer", "dcr")
# The towers of the others are as DIVA's.
SAMPLE = ("diva", "genhancer", "dcr", "smartclip")


def config_of(objective: str, source: str):
    if objective == "genhancer":
        c = small.genhancer_config(SPEC)
    elif objective in ("kuea", "smartclip", "comclip", "salm"):
        c = configs.default(SPEC, objective=objective)
    else:
        c = configs.default(SPEC, small.unclip_diffusion() if objective == "unclip" else small.diffusion(), objective)
    c.update(dtype="float32", frozen_dtype="float32", steps=STEP, batch_size=16, accum=1)
    c.backbone.source = source
    c.teacher.update(dataclasses.asdict(DINOV2))
    if objective == "kuea":
        c.kuea.teacher.update(dataclasses.asdict(DINOV2))
    if objective == "smartclip":  # Its captions are longer than the source's.
        c.backbone.text.update(context_length=TOKENS, kept_positions=4)
    c.ema.decay = 0.9 if RUNS[objective] else 0.0
    return c


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "clip"
    written_by_open_clip(SPEC, folder)
    return str(folder)


def saved(c, p, workdir) -> dict[str, jax.Array]:
    """Writes a workdir with one checkpoint; returns every parameter of the towers, as the run's evaluation has them."""
    kinds = ("params", "ema") if c.ema.decay else ("params",)
    state = {k: {n: a for n, a in small.random_arrays(p, i).items() if n in p.trained} for i, k in enumerate(kinds)}
    workdirs.write_config(workdir, c)
    sha = {"source": ["x"], "sha256": readers.fingerprint(origins.open_source(c.backbone.source).files)}
    meta = {"sources": {n: sha for n, part in p.objective.pretrained().items() if part.source == c.backbone.source}}
    with checkpoint.Checkpoints(workdir) as checkpoints:
        checkpoints.save(STEP, state | {"step": jax.numpy.int32(STEP)}, {}, meta, True)
    needed = set().union(*(p.towers.needs(t) for t in p.towers.shapes)) - set(p.trained)
    return {**load.initial_arrays(p, needed, every_source=False)[0], **averaged(state)}


def token_ids() -> np.ndarray:
    """Texts of several lengths; the highest id is that of the end."""
    ids = np.random.default_rng(3).integers(3, SPEC.text.vocab_size - 1, (COUNT, TOKENS)).astype(np.int32)
    for row, length in zip(ids, (5, TOKENS, 11), strict=True):
        row[length - 1], row[length:] = SPEC.text.vocab_size - 1, 0
    return ids


@pytest.mark.parametrize("objective", [n if n in SAMPLE else pytest.param(n, marks=pytest.mark.slow) for n in RUNS])
def test_originals_compute_what_the_evaluation_does(objective, source, tmp_path):
    c = config_of(objective, source)
    configs.validate(c, 1)
    p = small.program(c)
    params, spec = saved(c, p, tmp_path / "run"), backbones.spec_of(c)
    assert any("/lora/" in n for n in params) == any("/lora/" in n for n in p.trained) == (objective in LORA)

    # As the train loop evaluates it, and as the command does.
    towers = encode.Towers(spec, p.mesh, Settings(batch_size=COUNT))
    merged, read = p.towers(params), encode.read(str(tmp_path / "run"), STEP, c, p.mesh)
    want = towers.images(merged["vision"], patch, COUNT)["pooled"]
    close(towers.images(read.vision, patch, COUNT)["pooled"], want, 1e-6)
    # The tower as it is trained, its adapters beside their weights.
    pixels = np.stack([images.prepare(patch(i), spec.image_size, spec.resize_mode, "bicubic") for i in range(COUNT)])
    view = normalise(to_float(pixels), spec.mean, spec.std)
    rest = {n: np.zeros(a.shape, a.dtype) for n, a in p.arrays.items() if n not in params}
    trained = jax.jit(lambda a, x: p.skeleton.merge(a).vision.encode(x).pooled)({**rest, **params}, view)
    close(want, trained, 2e-5)

    found = runs.open_run(tmp_path / "run")
    assert ("text" in merged) == (objective == "smartclip") and found.run["tuned"] == sorted(merged)
    nchw, ids = np.array(view).transpose(0, 3, 1, 2).copy(), token_ids() if "text" in merged else None
    texts = None if ids is None else towers.texts(merged["text"], ids)
    if ids is not None:
        close(towers.texts(read.text, ids), texts, 1e-6)
    for fmt, kind in (("open_clip", "open_clip"), ("hf", "transformers")):
        layouts.export(found, found.spec, out := tmp_path / fmt, fmt, run=False)
        args = (out, nchw.transpose(0, 2, 3, 1), ids)
        theirs = getattr(reference, f"{kind}_embeddings")(*args, *([TOKENS] if fmt == "hf" else []))
        theirs = theirs[0] if fmt == "hf" else theirs
        close(theirs[0], want, 2e-5)
        if ids is not None:
            close(theirs[2], texts, 2e-5)
    prepare = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'open_clip'}")[2]
    np.testing.assert_allclose(np.stack([prepare(patch(i)).numpy() for i in range(COUNT)]), nchw, atol=1e-6)
