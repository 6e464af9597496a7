"""`diva_jax.load` and `diva_jax.objective`: the numbers of evaluation and training, errors of one sentence."""

import copy
import dataclasses
import importlib
import json
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
import small
from e2e_config import get_config, rotations
from eval_data import encoded, patch
from helpers import refused
from PIL import Image
from specs import EVAL_CLIP

import diva_jax
from diva_jax import api, config, demo
from diva_jax.data import images, tokenizers
from diva_jax.evals import encode
from diva_jax.evals.tasks import drift
from diva_jax.training import workdirs
from diva_jax.weights import names, parts
from diva_jax.weights.export import publish

COUNT = 5
# Counts by its index, as a series of pandas that was shuffled.
Series = type("Series", (dict,), {"__iter__": lambda self: iter(self.values())})


@pytest.fixture(scope="module")
def clip(home):
    names.write_random_clip(home, EVAL_CLIP)
    demo.write_byte_tokenizer(home)
    return home


@pytest.fixture(scope="module")
def encoder(clip):
    return diva_jax.load(clip, batch_size=8)


def test_every_form_of_images(encoder, clip, tmp_path):
    """As the model itself computes each image."""
    spec = EVAL_CLIP
    pixels = [images.prepare(patch(i), spec.image_size, spec.resize_mode, spec.interpolation) for i in range(COUNT)]
    pixels = np.stack(pixels)
    x = (pixels / np.float32(255) - np.float32(spec.mean)) / np.float32(spec.std)
    want = np.asarray(parts.load(str(clip), spec).encode(x.astype(np.float32)).pooled)
    files, given = [tmp_path / f"{i}.png" for i in range(COUNT)], [patch(i) for i in range(COUNT)]
    for image, file in zip(given, files, strict=True):
        file.write_bytes(encoded(image))
    for given_as in (given, files, [str(f) for f in files], [np.asarray(p.convert("RGB")) for p in given], pixels):
        found = encoder.encode_image(given_as)
        assert found.shape == (COUNT, encoder.spec.embed_dim) and found.dtype == np.float32
        np.testing.assert_allclose(found, want, atol=2e-5)
        np.testing.assert_allclose(encoder.encode_image(given_as[2]), want[2:3], atol=2e-5)
    np.testing.assert_array_equal(np.stack([encoder.preprocess(p) for p in given]), pixels)
    for some in ((p for p in given[:2]), Series({1: given[0], 0: given[1]}), np.array(list(map(str, files[:2])))):
        np.testing.assert_allclose(encoder.encode_image(some), want[:2], atol=2e-5)
    (wide := Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(40, 30) * 50)).save(tmp_path / "wide.png")
    np.testing.assert_array_equal(encoder.preprocess(wide), encoder.preprocess(tmp_path / "wide.png"))
    assert encoder.encode_image([]).shape == encoder.encode_text([]).shape == (0, encoder.spec.embed_dim)
    found = encoder.encode_image((given * 4)[:19], normalise=True)  # More than a batch.
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(found[:COUNT], found[COUNT : 2 * COUNT], atol=1e-6)


def test_images_that_are_decoded_at_once_have_a_bound(encoder, tmp_path, monkeypatch):
    """Until they are prepared; a broken one gives its room back."""
    good, broken, held, most = tmp_path / "good.png", tmp_path / "broken.png", [], []
    good.write_bytes(data := encoded(patch(0)))
    broken.write_bytes(data[: len(data) // 2])
    monkeypatch.setattr(images, "_MEMORY", images.Memory(8 * 2 * np.prod(patch(0).size)))
    for _ in range(3):
        refused("broken.png cannot be read", encoder.encode_image, broken)
    decode, prepare = images.decode, images.prepare
    monkeypatch.setattr(images, "decode", lambda *a: held.append(1) or most.append(len(held)) or decode(*a))
    slow = lambda *a: time.sleep(0.02) or held.pop() and prepare(*a)  # noqa: E731
    monkeypatch.setattr("diva_jax.api.encoder.prepare", slow)
    assert len(set(map(bytes, encoder.encode_image([good] * 40)))) == 1 and max(most) == 2


@pytest.mark.parametrize("mode", ("shortest", "squash:{}", "shortest:{}"))
def test_results_of_preprocess_pass_unchanged(encoder, mode):
    made, mode = copy.copy(encoder), mode.format(encoder.spec.image_size + 8)
    made.spec, made._towers = dataclasses.replace(made.spec, resize_mode=mode), {}
    x = made.preprocess(patch(1))
    np.testing.assert_array_equal(made.preprocess(x), x)
    np.testing.assert_array_equal(made.encode_image([patch(1)]), made.encode_image([x]))
    assert (made.preprocess(Image.fromarray(x)) != x).any() == (":" in mode)  # An image of this size is not prepared.


def test_a_bare_file_needs_a_spec_and_texts_are_those_of_the_text_tower(clip, tmp_path, encoder):
    bare = tmp_path / "tower.safetensors"
    bare.write_bytes((clip / "open_clip_model.safetensors").read_bytes())
    refused("does not specify the number of heads .*Python: load.*spec=", diva_jax.load, bare)
    found = diva_jax.load(bare, spec=EVAL_CLIP)
    assert found.spec.width == EVAL_CLIP.width and found.arrays
    refused("has no tokenizer", found.encode_text, "x")
    texts = ["a photo of a cup", "A dog, ünder ☃", ""]
    ids = tokenizers.open_tokenizer(EVAL_CLIP.text, clip)(texts)
    want = np.asarray(parts.load(str(clip), EVAL_CLIP, tower="text").encode(ids))
    np.testing.assert_allclose(encoder.encode_text(texts), want, atol=2e-5)
    np.testing.assert_allclose(encoder.encode_text(texts[1]), want[1:2], atol=2e-5)


def test_bad_images_are_one_sentence(encoder, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "broken.png").write_bytes(encoded(patch(0))[:40])
    for given, says in (
        (np.zeros((8, 8), np.uint8), r"has the shape .N, H, W, 3., not .8, 8."),
        *((np.zeros((2, *s), np.uint8), "not uint8 .{}, {}, {}.".format(*s)) for s in ((8, 8, 4), (0, 8, 3))),
        (tmp_path / "none.png", "none.png cannot be read .*No such file.*: check the path"),
        ([tmp_path / "broken.png"], "broken.png cannot be read"),
        ([3], "not int64 .."),
        (Image.new("F", (9, 7)), "an image cannot be used .*no range.*: crop it, or scale its pixels"),
        (Image.new("L", (1, 40000)), "an image cannot be used .1x40000 pixels are too many, or too far from a square"),
        ([np.zeros((1, 40000, 3), np.uint8)], "an image cannot be used .40000x1 pixels are too many"),
        (rng.normal(size=(2, 3, 8, 9)), "give the image as it is before normalisation"),
    ):
        refused(says, encoder.encode_image, given)
    # What the message gives works, in place of arrays of other types, ranges and orders of axes.
    image = rng.integers(0, 256, (9, 7, 3), np.uint8)
    for order in ((0, 1, 2), (2, 0, 1)):
        for x in (image, image.astype(np.float32), image / 255, image.astype(np.int64), image > 99):
            x = x.transpose(order)
            if x.dtype != np.uint8 or order[0]:
                said = refused("an array uint8 .H, W, 3., not", encoder.encode_image, [x])
                fixed = eval(said.rpartition(": give ")[2], {"x": x, "np": np})  # noqa: S307
                np.testing.assert_array_equal(fixed, 255 * (image > 99) if x.dtype == bool else image)
    for method, wrong in dict(encode_image="normalize", preprocess="img", with_params="parms").items():
        refused(f"{method} has no argument {wrong}; did you mean", getattr(encoder, method), **{wrong: 1})
    refused("encode_text takes texts, not int", encoder.encode_text, ["a", 3])
    refused("texts=None are no texts: give one, or a list", encoder.encode_text, None)
    refused("images=None are no images: give one, or a list", encoder.encode_image, None)


# A function, its arguments, and what the sentence has; "$" is the folder of `clip`.
REFUSED = json.loads(Path(__file__).with_name("refused.json").read_text())


@pytest.mark.parametrize("function, given, says", REFUSED, ids=[case[-1][:40] for case in REFUSED])
def test_arguments_are_refused_with_what_is_meant(clip, tmp_path, monkeypatch, function, given, says):
    monkeypatch.chdir(tmp_path)
    refused(says, getattr(api, function), **json.loads(json.dumps(given).replace("$", str(clip))))
    assert not list(tmp_path.iterdir())


def test_weights_are_checked_before_the_first_are_evaluated(clip, tmp_path, monkeypatch):
    """What they state about images is said where the config has another preparation."""
    half, c = shutil.copytree(clip, tmp_path / "half"), config.default(EVAL_CLIP)
    stated = json.loads((half / "open_clip_config.json").read_text())
    stated["preprocess_cfg"] |= {"mean": [0.5] * 3, "interpolation": "bilinear"}
    (half / "open_clip_config.json").write_text(json.dumps(stated))
    c.backbone.source, c.eval.bootstrap, c.eval.drift.neighbours = str(clip), 10, 1
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encoded(patch(i)))
    task, scored = {"drift": tmp_path}, mock.Mock(wraps=drift.Drift.evaluate)
    monkeypatch.setattr(drift.Drift, "evaluate", lambda *args: scored(*args))
    refused("gone.* does not exist", api.evaluate, c, [clip, half, tmp_path / "gone"], task, out=tmp_path / "out")
    assert not scored.called
    found = api.evaluate(c, [clip, half], task, out=tmp_path / "out")
    assert ["mean=[0.5, 0.5, 0.5]" in note for note in found["notes"] if note.startswith(str(half))] == [True, False]
    about = "pt", "float32", publish.ExportOptions()
    refused("mean=.*: leave --config out", publish.export, half, tmp_path / "pt", *about, run=False, spec=EVAL_CLIP)
    (other := config.default(EVAL_CLIP)).backbone.text.context_length = 99
    monkeypatch.setattr(workdirs, "read_config", lambda _: other)
    monkeypatch.setattr(workdirs.RunAt, "program", SimpleNamespace(towers=SimpleNamespace(shapes={"text": {}})))
    refused("config.backbone.text: context_length is 99 there", encode.check, "runs/a", 4, c, False)


def test_other_parameters(encoder, clip, tmp_path):
    """Those of a loop of one's own: in the encoder, and exported."""
    given, texts = {f"vision/{n}": a for n, a in encoder.arrays.items()}, ["a cup"]
    images, words = encoder.encode_image(patch(0)), encoder.encode_text(texts)
    np.testing.assert_array_equal(encoder.with_params(given).encode_image(patch(0)), images)
    tuned = {n: 1.1 * a for n, a in given.items()} | {"logit_scale": np.float32(3)}
    changed = encoder.with_params(tuned)
    assert np.abs(changed.encode_image(patch(0)) - images).max() > 1e-2
    np.testing.assert_array_equal(changed.encode_text(texts), words)
    np.testing.assert_array_equal(encoder.encode_image(patch(0)), images)
    tuned |= {f"text/{n}": 1.1 * a for n, a in encoder._text[1].items()}
    both = encoder.with_params(tuned)
    assert np.abs(both.encode_text(texts) - words).max() > 1e-2
    loaded = diva_jax.load(diva_jax.export(clip, tmp_path / "out", params=tuned), batch_size=8)
    np.testing.assert_array_equal(loaded.encode_image(patch(0)), changed.encode_image(patch(0)))
    np.testing.assert_array_equal(loaded.encode_text(texts), both.encode_text(texts))
    assert "with other values of logit_scale, text, vision" in (tmp_path / "out/README.md").read_text()
    name = next(iter(given))
    for wrong in ({}, {n: a for n, a in given.items() if n != name}, given | {name: 1.0}, given | {"head/bias": 1.0}):
        for use in (encoder.with_params, lambda params: diva_jax.export(clip, tmp_path / "no", params=params)):
            refused("params are not those of whole towers.*give what Loss.towers", use, wrong)
            refused(f"{name} is of type int64: give unquantised floats", use, given | {name: np.ones(3, int)})


@pytest.fixture(scope="module")
def loss(files):
    """Of a head, over a tower that is frozen, in a run of plain gradient descent."""
    plain = dict(name="sgd", lr=1.0, momentum=0.0, clip=0.0, weight_decay=0.0, schedule="constant", warmup=0.0)
    c = rotations(files, accum=1, trainable=(("head/.*", 1.0), (".*", 0.0)))
    c.optim.update(plain)
    return diva_jax.objective(c)


def test_it_is_the_loss_and_the_gradient_of_training(loss):
    """One step of the run changes the parameters by the gradient."""
    batch = loss.batch([patch(i) for i in range(8)], seed=3)
    found = loss(batch, step=2)
    assert set(found.gradients) == set(loss.params) == {"head/kernel", "head/bias"}
    assert all(n.startswith("vision/") for n in loss.frozen)
    program = small.program(loss.config, 8)
    state = program.init_state({n: jnp.copy(a) for n, a in loss.params.items()}) | {"step": jnp.int32(2)}
    new, metrics = program.step(0)(state, loss.frozen, {**batch, "row": np.arange(8, dtype=np.int32)})
    np.testing.assert_allclose([found.loss, found.metrics["loss"]], metrics["loss"], rtol=1e-5)
    for name, gradient in found.gradients.items():
        want = np.asarray(loss.params[name]) - np.asarray(new["params"][name])
        np.testing.assert_allclose(gradient, want, atol=1e-5 + 1e-4 * np.abs(want).max())
    changed = {n: 1.1 * a for n, a in loss.params.items()}
    assert found.loss not in (loss(batch, step=3).loss, loss(batch, changed, step=2).loss)


def test_a_loss_follows_the_run(files):
    follows = diva_jax.objective(get_config(f"salm:{files}"))
    batch = follows.batch([patch(i) for i in range(8)])
    found = [follows(batch, step=step).metrics["gamma"] for step in (0, follows.config.steps)]
    assert found == pytest.approx([1.0, 0.1])


def test_batches_are_cropped_as_in_training(loss):
    c, image = loss.config.data.crop, patch(1)
    batch = loss.batch([image, image], seed=5)
    for i in range(2):
        box = images.sample_box(np.random.default_rng((5, i)), *image.size, tuple(c.scale), tuple(c.ratio))
        np.testing.assert_array_equal(batch["image"][i], images.resized_crop(image, box, 21, c.interpolation))
    assert loss.inputs == {"image": ((21, 21, 3), np.dtype(np.uint8))}


def test_bad_batches_are_one_sentence(loss):
    good = loss.batch([patch(i) for i in range(8)])
    for batch, says in (
        (None, "the batch lacks image: it must have image .uint8 .B, 21, 21, 3.."),
        (good | {"text": 1}, "the batch has text, which is no input"),
        ({"image": good["image"] / 255}, r"the input image is float64 .8, 21, 21, 3.: give uint8"),
        ({"image": good["image"][:, :10]}, r"is uint8 .8, 10, 21, 3."),
        (good | {"row": np.arange(8)}, "the input row is int64"),
        ({"image": good["image"][:5]}, "a batch of 5 cannot be split over 8 devices"),
        ({"image": good["image"][:0]}, "a batch of 0 cannot"),
        ({"image": None}, "the input image is object ..: give uint8 .0, 21, 21, 3."),
    ):
        refused(says, loss, batch)
    for params, says in (
        ({n: a for n, a in loss.params.items() if n != "head/bias"}, "params lacks head/bias: give all of Loss.params"),
        (loss.params | {"head/scale": 1.0}, "params has head/scale"),
        (loss.params | {"head/bias": np.zeros(3)}, r"head/bias as float64 .3. and not as floats .4."),
        (loss.params | {"head/bias": np.zeros(4, int)}, "head/bias as int64"),
        ([1], "params=.1. is no mapping of names: give params=Loss.params"),
    ):
        refused(says, loss, good, params)
    refused("__call__ has no argument paramss; did you mean params", loss, good, paramss=1)
    refused("2 images need as many texts", lambda: loss.batch([patch(0), patch(1)], ["one"]))
    refused("the image none.jpg cannot be read", loss.batch, "none.jpg")
    for wrong in (10**12, -1, 2.5, "3", None, np.zeros(2, int)):
        refused("^step=.* cannot be used .*: give a whole number from 0 to", loss, good, step=wrong)
        refused("^seed=.* cannot be used .*: give a whole number from 0 to", loss.batch, patch(0), seed=wrong)
    np.testing.assert_array_equal(loss.batch(patch(i) for i in range(8))["image"], good["image"])


def test_configs_as_arguments(tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text("from diva_jax import config\ndef get_config(arg=None):\n    return config.default('vitl14')\n")
    found = api.read_config(path, {"optim.lr": 3e-4, "steps": 7})
    assert (found.optim.lr, found.steps, found.is_locked) == (3e-4, 7, True)
    assert api.read_config(found, {"steps": 8}).steps == 8 and found.steps == 7
    sections = api.read_config(found, {"optim": {"lr": 0.1}, "data.crop": {"scale": (0.5, 1.0)}})  # Others stay.
    assert sections == api.read_config(found, {"optim.lr": 0.1, "data.crop.scale": (0.5, 1.0)})
    monkeypatch.setitem(sys.modules, "outside.data", importlib.import_module("outside.rotations"))
    refused("another section 'data', rename the module", api.configs.default, objective="outside.data")
    path.write_text("def get_config():\n    raise RuntimeError('no')\n")
    refused("mine.py does not make a config .RuntimeError: no", api.read_config, path)
