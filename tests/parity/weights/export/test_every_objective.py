"""The export of each objective's run, in open_clip and transformers: the embeddings that the run's evaluation computes.

Nothing is trained: the checkpoint has random values in place of what the objective trains.
"""

import dataclasses

import jax
import numpy as np
import open_clip
import pytest
import small
import torch
from eval_data import patch
from exports import written_by_open_clip
from helpers import close
from specs import CLIP_FOLDER, DINOV2
from transformers import CLIPModel

from diva_jax import config as configs
from diva_jax.data import images
from diva_jax.data.preprocess import normalise, to_float
from diva_jax.evals import Settings, encode, encoders
from diva_jax.models import backbones
from diva_jax.training import checkpoint, load, workdirs
from diva_jax.training.step import averaged
from diva_jax.weights import origins, readers, runs
from diva_jax.weights.export import layouts

# Both libraries can hold it, and the objectives' autoencoders halve its sides.
SPEC = dataclasses.replace(CLIP_FOLDER, image_size=28, patch_size=7, select="random:5")
COUNT, STEP, TOKENS = 3, 5, 17
# Objective -> whether its run keeps a moving average.
RUNS = {"diva": True, "unclip": False, "genhancer": True, "dcr": False, "kuea": True, "smartclip": True}
LORA = ("genhancer", "dcr")
# The towers of the others are as DIVA's.
SAMPLE = ("diva", "genhancer", "dcr", "smartclip")


def config_of(objective: str, source: str):
    if objective == "genhancer":
        c = small.genhancer_config(SPEC)
    elif objective in ("kuea", "smartclip"):
        c = configs.default(SPEC, objective=objective)
    else:
        c = configs.default(SPEC, small.unclip_diffusion() if objective == "unclip" else small.diffusion(), objective)
    c.update(dtype="float32", frozen_dtype="float32", steps=STEP, batch_size=16, accum=1)
    c.backbone.source = source
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
    state = {"params": {n: a for n, a in small.random_arrays(p, 1).items() if n in p.trained}}
    if c.ema.decay:
        state["ema"] = {n: a for n, a in small.random_arrays(p, 2).items() if n in p.trained}
    workdirs.write_config(workdir, c)
    files = origins.open_source(c.backbone.source).files
    sha = {"source": ["x"], "sha256": readers.fingerprint(files)}
    meta = {"sources": {n: sha for n, part in p.objective.pretrained().items() if part.source == c.backbone.source}}
    with checkpoint.Checkpoints(workdir) as checkpoints:
        checkpoints.save(STEP, state | {"step": jax.numpy.int32(STEP)}, {}, meta, True)
    needed = set().union(*(p.towers.needs(t) for t in p.towers.shapes)) - set(p.trained)
    frozen, _ = load.initial_arrays(p, needed, every_source=False)
    return {**frozen, **averaged(state)}


def token_ids(count: int) -> np.ndarray:
    """Texts of several lengths; the highest id is that of the end."""
    rng, ids = np.random.default_rng(3), np.zeros((count, TOKENS), np.int32)
    for row, length in enumerate((5, TOKENS, 11)[:count]):
        ids[row, :length] = rng.integers(3, SPEC.text.vocab_size - 1, length)
        ids[row, length - 1] = SPEC.text.vocab_size - 1
    return ids


@pytest.mark.parametrize("objective", [n if n in SAMPLE else pytest.param(n, marks=pytest.mark.slow) for n in RUNS])
def test_originals_compute_what_the_evaluation_does(objective, source, tmp_path):
    c = config_of(objective, source)
    configs.validate(c, 1)
    p = small.program(c)
    params, spec = saved(c, p, tmp_path / "run"), backbones.spec_of(c)
    assert any("/lora/" in n for n in params) == (objective in LORA)
    assert any("/lora/" in n for n in p.trained) == (objective in LORA)

    # As the train loop evaluates it, and as the command does.
    towers = encode.Towers(spec, p.mesh, Settings(batch_size=COUNT))
    merged, read = p.towers(params), encoders.read(str(tmp_path / "run"), STEP, c, p.mesh)
    want = towers.images(merged["vision"], patch, COUNT)["pooled"]
    close(towers.images(read.vision, patch, COUNT)["pooled"], want, 1e-6)
    # The tower as it is trained, its adapters beside their weights.
    pixels = np.stack([images.prepare(patch(i), spec.image_size, spec.resize_mode, "bicubic") for i in range(COUNT)])
    view = normalise(to_float(pixels), spec.mean, spec.std)
    rest = {n: np.zeros(a.shape, a.dtype) for n, a in p.arrays.items() if n not in params}
    trained = jax.jit(lambda a, x: p.skeleton.merge(a).vision.encode(x).pooled)({**rest, **params}, view)
    close(want, trained, 2e-5)

    found = runs.open_run(tmp_path / "run")
    for fmt in ("open_clip", "hf"):
        layouts.export(found, found.spec, tmp_path / fmt, fmt, run=False)
    model, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'open_clip'}")
    model.eval()
    hf = CLIPModel.from_pretrained(tmp_path / "hf").eval()
    nchw = torch.from_numpy(np.array(view).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        theirs = model.encode_image(torch.stack([prepare(patch(i)) for i in range(COUNT)])).numpy()
        hf_images = hf.visual_projection(hf.vision_model(nchw).pooler_output).numpy()
    close(theirs, want, 2e-5)
    close(hf_images, want, 2e-5)

    assert ("text" in merged) == (objective == "smartclip")
    if "text" in merged:
        ids = token_ids(COUNT)
        want = towers.texts(merged["text"], ids)
        close(towers.texts(read.text, ids), want, 1e-6)
        with torch.no_grad():
            theirs = model.encode_text(torch.from_numpy(ids).long()).numpy()
            states = hf.text_model(torch.from_numpy(ids).long()).last_hidden_state
            ends = states[torch.arange(COUNT), torch.from_numpy(ids).argmax(-1).long()]
            hf_texts = hf.text_projection(ends).numpy()
        close(theirs, want, 2e-5)
        close(hf_texts, want, 2e-5)
