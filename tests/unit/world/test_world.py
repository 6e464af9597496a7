"""The small world: scenes, records, patch code, pairs and probes; the experiment's statistics can say no."""

import dataclasses
import io

import jax
import numpy as np
import pytest
from helpers import refused
from PIL import Image

from diva_jax import objectives, world
from diva_jax.data import sources, tokenizers
from diva_jax.evals.tasks import mmvp
from diva_jax.models.diffusion.presets import Diffusion
from diva_jax.world import arms, blindness, captions, comparison, experiment, models, records, scenes, vocabulary
from diva_jax.world.criteria import of_labels
from diva_jax.world.drawing import draw
from diva_jax.world.endpoints import ENDPOINTS, SEEN
from diva_jax.world.patch_code import PatchCodeConfig

FIELDS = {"relation": "relation", "colour": "colour", "binding": "colour", "shape": "shape"}


def drawn(seed: int = 3, count: int = 150) -> scenes.Scenes:
    return scenes.sample(np.random.default_rng(seed), count)


def test_scenes_and_images_follow_from_their_seed_and_have_two_different_objects():
    a, b, other = (drawn(s, 300) for s in (5, 5, 6))
    for field in dataclasses.fields(scenes.Scenes):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))
    assert (a.nuisance != other.nuisance).any()
    assert (a.shape[:, 0] != a.shape[:, 1]).all() and (a.colour[:, 0] != a.colour[:, 1]).all()
    assert set(a.shape.ravel()) == set(range(len(scenes.SHAPES))) and set(a.relation) == set(range(4))
    some = [scenes.Scenes(*(values[rows] for values in vars(a).values())) for rows in (range(70), [0], [37], [69], [])]
    together, *alone, none = map(draw, some)
    assert together.shape == (70, 16, 16, 3) and none.shape == (0, 16, 16, 3) and together.dtype == np.uint8
    np.testing.assert_array_equal(np.concatenate(alone), together[[0, 37, 69]])  # An image is of its own scene alone.


@pytest.mark.parametrize("fact", scenes.FACTS)
def test_change_changes_one_fact_of_scene_image_and_caption(fact):
    one, rng = drawn(), np.random.default_rng(1)
    two = scenes.change(one, fact, rng)
    for field in dataclasses.fields(scenes.Scenes):
        same = getattr(one, field.name) == getattr(two, field.name)
        if field.name == FIELDS[fact]:
            assert not same.reshape(len(one), -1).all(axis=1).any()
        else:
            assert same.all(), field.name
    assert (two.shape[:, 0] != two.shape[:, 1]).all() and (two.colour[:, 0] != two.colour[:, 1]).all()
    # The image shows it: no pair of images is equal.
    assert np.abs(draw(one).astype(int) - draw(two)).reshape(len(one), -1).max(axis=1).min() > 20
    says = captions.choose(rng, len(one), 1.0)
    for a, b in zip(captions.captions(one, says), captions.captions(two, says), strict=True):
        differ = [(x, y) for x, y in zip(a.split(), b.split(), strict=False) if x != y]
        assert a != b and (len(a.split()) != len(b.split()) or len(differ) <= 2), (a, b)


def test_the_first_object_is_where_the_relation_says():
    """Of images whose two objects are red and green, with no background in these colours."""
    s = dataclasses.replace(drawn(7, 200), colour=np.tile(np.int8([0, 1]), (200, 1)))
    for image, relation in zip(draw(s).astype(int), s.relation, strict=True):
        others = [image.max(-1, where=np.arange(3) != k, initial=0) + 35 for k in (0, 1)]
        red, green = (np.argwhere(image[..., k] > others[k]).mean(0)[int(relation >= 2) ^ 1] for k in (0, 1))
        assert (red < green) == (relation % 2 == 0)


def test_captions_name_the_relation_as_often_as_their_rates_say_and_from_either_side():
    s, rng = drawn(4, 2000), np.random.default_rng(9)
    for kind, rate in captions.KINDS.items():
        texts = captions.captions(s, captions.choose(rng, len(s), rate))
        assert abs(np.mean([any(r in t for r in scenes.RELATIONS) for t in texts]) - rate) < 0.05, kind
        assert all(scenes.SHAPES[a] in t and scenes.SHAPES[b] in t for t, (a, b) in zip(texts, s.shape, strict=True))
    one = captions.only(rng, len(s), "relation")
    texts = [captions.captions(s, one._replace(swap=np.full(len(s), x))) for x in (False, True)]
    opposite = dict(zip(scenes.RELATIONS, (*scenes.RELATIONS[1::-1], *scenes.RELATIONS[:1:-1]), strict=True))
    for a, b in zip(*texts, strict=True):
        told = next(r for r in scenes.RELATIONS if r in a)
        first, second = a.split(f" {told} ")
        assert b == f"{second} {opposite[told]} {first}"


def test_every_word_is_one_token_and_every_caption_fits(tmp_path):
    vocabulary.write(tmp_path, captions.WORDS, models.TOKENS)
    tokenizer = tokenizers.ClipTokenizer(*tokenizers.clip_vocabulary(tmp_path), models.TOKENS)
    words, end = tokenizer(captions.WORDS), vocabulary.tokens(captions.WORDS)["<|endoftext|>"]
    assert (words[:, 2] == end).all() and len(set(words[:, 1])) == len(captions.WORDS)
    texts = captions.captions(s := drawn(7, 800), captions.choose(np.random.default_rng(8), len(s), 1.0))
    assert {word for t in texts for word in t.split()} <= set(captions.WORDS)
    longest = max(texts, key=lambda t: len(t.split()))
    assert end in tokenizer([longest])[0]
    np.testing.assert_array_equal(vocabulary.remembering(tokenizer)([longest, "a"]), tokenizer([longest, "a"]))


def test_a_record_is_a_function_of_seed_number_and_kind_of_captions():
    source, again, other = (sources.open_source(records.path(seed, "rich", 1000)) for seed in (5, 5, 6))
    assert len(source) == 1000 and source.has_text
    for i in (0, 7, 999):
        assert source.read(i) == again.read(i) != other.read(i)
    image = np.asarray(Image.open(io.BytesIO(source.read(7).image)))
    assert image.shape == (16, 16, 3) and source.read(7).text and source.read(7, with_text=False).text is None
    biased = sources.open_source(records.path(5, "biased"))
    assert source.read(3).image == biased.read(3).image
    told = [sum(any(r in s.read(i).text for r in scenes.RELATIONS) for i in range(100)) for s in (source, biased)]
    assert told[0] > 85 and told[1] < 15


def test_texts_of_records_and_pairs_in_mmvps_layout(tmp_path):
    source = sources.open_source(records.path(5))
    assert source.read(0, with_text=False).texts is None
    for i in range(20):
        true, false = source.read(i).texts
        (a,), (b,) = ([r for r in scenes.RELATIONS if f" {r} " in t] for t in (true, false))
        assert true.replace(a, b) == false and scenes.RELATIONS.index(a) == scenes.RELATIONS.index(b) ^ 1
    some = sources.open_source(records.path(5, wrong=30))
    changed = [(source.read(i).texts, some.read(i).texts) for i in range(200) if source.read(i) != some.read(i)]
    assert 40 < len(changed) < 80 and all(source.read(i).image == some.read(i).image for i in range(200))
    for true, wrong in changed:
        (a,), (b,) = ([n for n, r in enumerate(scenes.RELATIONS) if f" {r} " in texts[0]] for texts in (true, wrong))
        assert a // 2 != b // 2 and [t.replace(scenes.RELATIONS[a], scenes.RELATIONS[b]) for t in true][0] == wrong[0]
    blindness.write_pairs(tmp_path, seed=4, count=3)
    names, count = mmvp.read_patterns(str(tmp_path))
    questions = mmvp.read_questions(str(tmp_path))
    assert names == scenes.FACTS and count == 3 and len(questions) == 2 * 3 * 4
    found = blindness.pairs(seed=4, count=3)
    assert [q.text for q in questions] == [f"a photo of {t}" for t in found.texts]
    assert (found.pattern == np.arange(12) // 3).all()
    assert all(a != b for a, b in zip(found.texts[::2], found.texts[1::2], strict=True))


def test_what_cannot_be_used_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("")
    for out in (None, "", "gs://bucket/x", "a_file", "a_file/x"):
        refused("^--out=.* give (one, e.g. --out=runs/x|another one)$", world.folder, out, "runs/x")
    assert str(world.folder("runs/x", "runs/x")) == "runs/x"
    path = tmp_path / experiment.RESULTS
    path.write_text('{"arm": "diva", "seed": 0}\n{"arm": "di')
    assert experiment.read(path) == [{"arm": "diva", "seed": 0}]
    path.write_text('{"arm"\n{"arm": "diva"}\n')
    refused("line 1 is no JSON", experiment.read, path)
    refused("--arms has no_such_arm", experiment.experiment, *(tmp_path / "a", ["no_such_arm"], [0], arms.Budget(), 1))
    assert arms.find("diva:optim.lr=1e-3:anchor.weight=0.5").fields["optim.lr"] == 1e-3
    refused("give each field a number", arms.find, "diva:optim.lr=high")


def test_the_code_is_orthonormal_and_keeps_most_of_the_world():
    basis, scale = models.basis()
    np.testing.assert_allclose(basis.T @ basis, np.eye(64), atol=1e-9)
    images = draw(drawn(3, 60)).astype(np.float32) / 127.5 - 1
    code = Diffusion.from_dict(dict(source="", prompt="", text_tokens=4, **models.DIFFUSION)).vae.build()
    code.basis[...] = jax.numpy.asarray(basis, np.float32)
    latents = code.encode(images)
    assert latents.shape == (60, 2, 2, 64) and 0.8 < float(np.std(np.asarray(latents))) < 1.2
    assert np.sum(images**2) - np.sum(np.square(latents / scale)) < 0.08 * images.size * np.var(images)
    for options, says in (
        ({"patch_size": 2, "latent_channels": 13}, "keeps 13 numbers of a patch that has only 12"),
        ({"block_out_channels": [8]}, "unknown option .?block_out_channels"),
    ):
        refused(says, PatchCodeConfig.from_dict, options)


def test_labels_are_of_the_left_or_upper_object_and_classes_of_both():
    s = drawn(3, 200)
    before, found = blindness.labels(s), blindness.classes(s)
    related, bound = (scenes.change(s, f, np.random.default_rng(0)) for f in ("relation", "binding"))
    for other, same in ((related, False), (bound, True)):
        after = blindness.labels(other)
        assert (after["near colour"] != before["near colour"]).all()
        assert ((after["near shape"] == before["near shape"]) == same).all()
        assert ((blindness.classes(other) == found) != same).all()
    assert len(blindness.CLASSES) == 72 and len(set(found)) > 60
    for i, k in enumerate(found):
        assert set(blindness.CLASSES[k]) == set(zip(s.colour[i].tolist(), s.shape[i].tolist(), strict=True))


def test_tests_share_no_scene_and_an_oracle_of_the_texts_sees_all(monkeypatch):
    monkeypatch.setattr(blindness, "_PROBE_TRAIN", 60)
    monkeypatch.setattr(blindness, "_PROBE_TEST", 40)
    t = blindness.Tests.make(seed=1, count=5)
    assert len({x.tobytes() for x in [*t.train_images, *t.test_images]}) == 100
    assert (t.pairs.images.shape, len(t.pairs.texts)) == ((20, 2, 16, 16, 3), 40)
    texts = np.eye(40 + 72)
    own = {image.tobytes(): texts[i] for i, image in enumerate(t.pairs.images.reshape(40, 16, 16, 3))}
    own |= {image.tobytes(): texts[40 + k] for image, k in zip(t.test_images, blindness.classes(t.test), strict=True)}
    found = blindness.measure(t, lambda x: np.stack([own.get(i.tobytes(), texts[0]) for i in x]), texts)
    for name, e in ENDPOINTS.items():
        assert e.score(found) == 100 or name.startswith("probe"), name


TESTS = sorted({test for e in ENDPOINTS.values() for test in e.tests})


def rows(shares: dict[str, float], seeds: int = 5, seed: int = 0) -> list[dict]:
    rng, out = np.random.default_rng(seed), []
    for arm, share in shares.items():
        for s in range(1 if arm == "untuned" else seeds):
            found = {name: (rng.random(150) < share).astype(float) for name in TESTS}
            out.append(experiment.row(arm, s, 8, {"images": 8, "early": 4}, found, drift=0.0))
    return out


def test_nothing_is_claimed_without_a_worse_control_and_several_seeds():
    shares = {"untuned": 0.4, "diva": 0.55, "diva_control": 0.55}
    found = comparison.compare(rows(shares, seed=1))["diva"]
    assert found.untuned[SEEN].sign == 1 and found.control[SEEN].sign == 0
    assert "than its control: no difference shown" in comparison.verdict("diva", found)
    claims = 0  # Of draws without an effect; 95% intervals of each kind alone would claim one in twenty.
    for seed in range(20):
        control, tuned = ([r for r in rows(shares, seed=seed) if r["arm"] == arm] for arm in ("diva_control", "diva"))
        claims += comparison.difference(control, tuned, SEEN).sign != 0
    assert claims <= 3
    alone = comparison.compare(rows({"untuned": 0.4, "diva": 0.6}))
    assert "its control was not run" in comparison.verdict("diva", alone["diva"])
    single = comparison.compare(rows({"untuned": 0.4, "diva": 0.9, "diva_control": 0.1}, seeds=1))["diva"]
    assert single.untuned[SEEN].sign == 0 == single.control[SEEN].sign
    assert "nothing can be claimed" in comparison.verdict("diva", single)


def test_an_arm_above_both_and_one_below(tmp_path):
    shares = {"untuned": 0.4, "labels": 0.7, "judge_control": 0.42, "diva": 0.15, "diva_control": 0.42}
    found = comparison.compare(rows(shares))
    assert comparison.verdict("labels", found["labels"]) == "sees more; than its control: sees more; names better"
    assert comparison.verdict("diva", found["diva"]).startswith("sees less; than its control: sees less; names -")
    text = comparison.markdown(found)
    score = found["labels"].scores[SEEN]
    assert abs(score - 70) < 5 and f"| `labels` | 5 | {score:.1f} |" in text and "seeds [" in text
    comparison.write_pareto(found, tmp_path / "pareto.png")
    assert Image.open(tmp_path / "pareto.png").width == 1440 and {c.holds for c in of_labels(rows(shares))} == {True}
    assert False in {c.holds for c in of_labels(rows(shares | {"labels": 0.5}))}


def test_every_arm_has_the_same_budget_and_a_control_that_differs():
    """tests/runs builds each."""
    for name in set(arms.ARMS) - {"untuned"}:
        arm = arms.find(name)
        c = arms.arm_config(arm, 2, arms.Budget(1600, 16), "x")
        last = objectives.stages(c)[-1]
        assert last.end - last.start == c.steps == 100 and c.seed == 2
        assert ('"source": "x"' in c.to_json()) or arm.teacher != arms.RANDOM
        control = arm.control and arms.arm_config(arms.find(arm.control), 2, arms.Budget(1600, 16), "x")
        assert not control or control.to_json() != c.to_json()
