"""Feedback: condition gap and gradient agreement by hand, and for planted signals; test_train_eval.py has devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from eval_data import write_class_folders, write_image
from helpers import failed, refused

from diva_jax.common.fields import default_of
from diva_jax.evals import Settings, encode, evaluator, results
from diva_jax.evals.tasks import feedback
from diva_jax.models.diffusion import schedule
from diva_jax.objectives import diva
from diva_jax.training import partition

COUNT = 11  # One group of gradients and three more images.
SEED = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_class_folders(tmp_path_factory.mktemp("feedback"), [0] * COUNT, ["."])


def runner(folder):
    c = small.diva_config(eval__bootstrap=400, eval__batch_size=4, eval__seed=SEED, eval__feedback__draws=3)
    return evaluator.Evaluator(c, partition.make_mesh(c.mesh, jax.devices()[:1]), {"feedback": str(folder)})


@pytest.fixture(scope="module")
def one(folder):
    return runner(folder)


def arrays_of(run) -> dict[str, jax.Array]:
    return small.random_arrays(run.tasks["feedback"].program)


def outcome(run, arrays, label="x"):
    with jax.default_matmul_precision("highest"):  # As in every test, so that nothing is compiled twice.
        return run.tasks["feedback"].evaluate(run.model(label, encode.Encoder({}, None, "", arrays, "")))


@pytest.fixture(scope="module")
def found(one):
    return outcome(one, arrays_of(one))


def by_hand(run, arrays) -> dict[str, np.ndarray]:
    """Computes losses [COUNT, bins] per image and timestep, from the parts of the objective."""
    task = run.tasks["feedback"]
    module = task.program.skeleton.merge(arrays)
    abar = schedule.alphas_cumprod(module.diffusion.scheduler)
    look = jax.jit(lambda pixels: (module.vae.encode(2 * pixels - 1), module.vision.encode(module.view(pixels))))
    unet = jax.jit(lambda noisy, t, c: module.unet(noisy, t, c))
    seen = [look(jnp.asarray(p, jnp.float32)[None] / 255) for p in task._pixels]
    assert module.spec.add_text == "mean"
    text = jnp.repeat(module.text_context[...].mean(axis=1, keepdims=True), 6, axis=1)
    out = {k: np.zeros((COUNT, 10)) for k in ("own", "other", "text", "nats")}
    nats = schedule.nats_per_error(module.diffusion.scheduler, seen[0][0].size)
    for i in range(COUNT):
        latents = seen[i][0]
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), 0), i)
        drawn = module.draw(key[None], latents.shape[1:], 10)
        for k in range(10):
            t = 100 * k + int(drawn.timesteps[k, 0]) // 10
            out["nats"][i, k] = 100 * nats[t]
            noisy = abar[t] ** 0.5 * latents + (1 - abar[t]) ** 0.5 * drawn.noise[k]
            for name, whose in (("own", i), ("other", task.partners[i]), ("text", None)):
                c = text
                if whose is not None:
                    tokens = seen[whose][1].tokens[:, drawn.token_indices[k, 0]]
                    c = text + module.visual_proj(jnp.concatenate([seen[whose][1].pooled[:, None], tokens], 1))
                out[name][i, k] = float(jnp.mean((unet(noisy, jnp.array([t]), c) - drawn.noise[k]) ** 2))
    return out


def test_losses_and_gaps_by_hand(one, found):
    hand = by_hand(one, arrays_of(one))
    rows = {}
    for r in found.rows:
        assert r["weights"] == "x" and r["file"] == f"{r['item']:03}.png"
        rows[r["metric"].removeprefix("loss_"), r["item"], int(r["timesteps"].split("-")[0]) // 100] = r["score"]
    assert len(rows) == len(found.rows) == 3 * COUNT * 10
    for (name, i, k), value in rows.items():
        assert value == pytest.approx(hand[name][i, k], rel=2e-5), (name, i, k)
    scores, bins = found.results["scores"], found.results["timesteps"]
    assert [(b["low"], b["high"]) for b in bins] == [(k, k + 100) for k in range(0, 1000, 100)]
    gaps = {f"gap_{name}": hand[name] - hand["own"] for name in ("other", "text")}
    for name, want in {"loss_own": hand["own"], **gaps}.items():
        assert scores[name]["score"] == pytest.approx(want.mean(), abs=2e-5)
        assert scores[name]["interval"][0] < scores[name]["score"] < scores[name]["interval"][1]
        for k, b in enumerate(bins):
            assert b["scores"][name]["score"] == pytest.approx(want[:, k].mean(), abs=2e-5)
    for name in ("other", "text"):
        want, bound = (hand["nats"] * gaps[f"gap_{name}"]).sum(axis=1).mean(), np.abs(hand["nats"]).sum(axis=1).mean()
        assert scores[f"nats_{name}"]["score"] == pytest.approx(want, abs=2e-5 * bound)
    assert len({round(x, 6) for x in hand["own"].ravel()}) == hand["own"].size  # All values differ.
    cosine = scores["gradient_cosine"]
    assert -1 < cosine["score"] < 0.999 and cosine["interval"] is None  # There is one group.
    assert scores["gradient_snr"]["score"] == pytest.approx(cosine["score"] / (1 - cosine["score"]))


def test_weights_that_are_not_finite_are_refused(one):
    arrays = arrays_of(one)
    name = next(n for n in arrays if n.startswith("vision/blocks/0"))
    says = f"x: the diffusion losses of {COUNT} of {COUNT} images are not finite"
    failed(says, outcome, one, arrays | {name: arrays[name] * np.nan})


def test_a_unet_that_ignores_its_condition(one, found):
    arrays = arrays_of(one)
    deaf = {n: jax.device_put(jnp.zeros_like(a), a.sharding) for n, a in arrays.items() if "/attn2/to_v/" in n}
    assert deaf
    silent = outcome(one, {**arrays, **deaf}, "deaf")
    scores, notes = silent.results["scores"], silent.results["notes"]
    changed = one.tasks["feedback"].compare(found, silent)["scores"]
    for gap in ("gap_other", "gap_text"):
        assert scores[gap]["score"] == pytest.approx(0, abs=1e-9)
        assert changed[gap]["difference"] == pytest.approx(-found.results["scores"][gap]["score"], abs=1e-9)
        for of in (silent, found):
            low, high = of.results["scores"][gap]["interval"]
            assert low <= 0 <= high or of is found
            noted = sum("): these data do not show" in n and feedback.METRICS[gap] in n for n in of.results["notes"])
            assert noted == (low <= 0 <= high)
    assert "gradient_cosine" not in scores and "gradient_snr" not in scores
    assert any("gradient is zero" in n for n in notes) and all(np.isfinite(r["score"]) for r in silent.rows)
    assert set(changed) == {"loss_own", "gap_other", "gap_text", "nats_other", "nats_text"}
    tasks, _ = one.report({"x": [{"feedback": found}], "deaf": [{"feedback": silent}]})
    text = results.table({"summary": [], "tasks": tasks})
    assert sum("zero within its interval" in line and "deaf: " in line for line in text.splitlines()) == 2


def test_gradients_by_hand(one, found):
    """Compares all pairs of the three gradients of one group, of the loss of training."""
    task, arrays, units = one.tasks["feedback"], arrays_of(one), []
    images, skeleton = {"image": jnp.stack(task._pixels[:8])}, task.program.skeleton
    gradient = jax.jit(jax.grad(lambda trained, keys: skeleton.merge(arrays, trained).loss(images, keys)[0]))
    for r in range(3):
        keys = jnp.stack([jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), 1 + r), i) for i in range(8)])
        gradients = gradient({n: a for n, a in arrays.items() if n.startswith("vision/")}, keys)
        flat = np.concatenate([np.ravel(g) for g in gradients.values()]).astype(np.float64)
        units.append(flat / np.linalg.norm(flat))
    cosine = np.mean([units[a] @ units[b] for a, b in ((0, 1), (0, 2), (1, 2))])
    assert found.results["scores"]["gradient_cosine"] == {"score": pytest.approx(cosine, abs=2e-6), "interval": None}


def test_partners_are_never_oneself():
    for n in (2, 3, 50):
        p = feedback.partners(n, 1)
        assert sorted(p) == list(range(n)) and (p != np.arange(n)).all()


def test_what_cannot_be_judged_is_refused(folder, tmp_path, monkeypatch):
    prepare = lambda path: feedback.prepare(str(path), default_of(feedback), Settings())  # noqa: E731
    refused("--data=feedback='.*none' does not exist", prepare, tmp_path / "none")
    write_image(tmp_path / "a.png", 0)
    refused("has 1 images: give at least 2", prepare, tmp_path)
    (tmp_path / "b.png").write_bytes(b"no image")
    refused("the image b.png of .* cannot be read", runner, tmp_path)
    monkeypatch.delattr(diva.Objective, "condition_losses")
    refused("config.objective='diva', which lacks condition_losses", runner, folder)
