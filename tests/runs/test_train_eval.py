"""Evaluation during training: the logged scores, and no effect on training."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from unittest import mock

import chex
import jax
import numpy as np
import pytest
import small
from e2e_config import get_config
from eval_data import write_class_folders
from helpers import rows
from places import SUPPORT
from processes import finish, start_all

from diva_jax.common.results_schema import Task
from diva_jax.evals import encode, evaluator
from diva_jax.report import page
from diva_jax.report.inputs import read
from diva_jax.training import checkpoint, compiler, metrics, partition
from diva_jax.training.loop import Run
from diva_jax.weights import origins

TOTAL = 5
CONFIG = f"--config={SUPPORT}/e2e_config.py:"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_class_folders(tmp_path_factory.mktemp("photos"), [0] * 13, ["."])


def config(files, **fields):
    """On eight devices, over which the parameters are split."""
    first = dict(steps=TOTAL, accum=1, condition__warmup_steps=0, checkpoint__every=2, mesh__fsdp=4, mesh__min_shard=64)
    return small.with_fields(get_config(str(files)), first | fields)


def evaluating(files, photos):
    tasks = (f"feedback={files}/photos", f"drift={photos}")
    feedback = dict(eval__feedback__images=9, eval__feedback__draws=2)
    return config(files, eval__every=2, eval__data=tasks, eval__batch_size=8, **feedback)


def evaluations(workdir: Path) -> dict[int, dict]:
    """Returns the rows of evaluations by step, without the time that each was written at."""
    found = {r.pop("step"): r for r in rows(workdir) if "feedback/gap_other" in r}
    return {step: {k: v for k, v in r.items() if k != "seconds"} for step, r in found.items()}


def trained(c, workdir: Path) -> dict[str, np.ndarray]:
    state, _, _ = checkpoint.restore(workdir, TOTAL, small.program(c, 8).abstract_state(0))
    return {n: np.asarray(a) for n, a in state["params"].items()}


def train(c, workdir: Path) -> bool:
    with jax.default_matmul_precision("highest"):  # As in every test: what a fixture compiles is not compiled again.
        return Run(c, workdir).run()


@pytest.fixture(scope="module")
def ran(files, photos, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "evaluated"
    assert train(evaluating(files, photos), workdir)
    return workdir


def test_two_processes_have_the_same_losses_and_scores(ran, files, photos, tmp_path):
    fields = ["steps=5", "condition.warmup_steps=0", "eval.every=5", "eval.batch_size=8"]
    fields += ["eval.feedback.images=9", "eval.feedback.draws=2"]
    fields += [f"eval.data=feedback={files}/photos", f"eval.data=drift={photos}"]  # A tuple field: given twice.
    ends = finish(start_all(files, tmp_path / "two", 2, *(f"--config.{f}" for f in fields), config=CONFIG))
    assert [code for code, _, _ in ends] == [0, 0], ends
    losses = [[r["loss"] for r in rows(workdir) if "loss" in r] for workdir in (tmp_path / "two", ran)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    ours, alone = evaluations(tmp_path / "two"), evaluations(ran)
    assert list(ours) == [0, TOTAL]
    for step, row in ours.items():
        # Nats are sums of differences, of which one may be next to zero.
        largest = max(abs(v) for k, v in alone[step].items() if "nats" in k)
        assert row.keys() == alone[step].keys()
        for k, v in alone[step].items():
            assert row[k] == pytest.approx(v, rel=2e-3, abs=1e-4 * largest if "nats" in k else 1e-5), k
    assert "evaluated step 5" in ends[0][1] and "evaluated" not in ends[1][1]


def test_rows_of_evaluations(ran):
    found = evaluations(ran)
    assert list(found) == [0, 2, 4, 5]  # Before the first step, every second, after the last.
    for row in found.values():
        assert all(np.isfinite(v) for v in row.values())
        low, value, high = (row[f"feedback/gap_other{end}"] for end in ("/low", "", "/high"))
        assert low < value < high
        scores = {"feedback/loss_own", "feedback/gap_text", "feedback/gradient_cosine", "eval/drift/cosine/low"}
        assert scores <= set(row)
        assert sum(k.startswith("feedback_by_timestep/gap_text/") and k.endswith("/low") for k in row) == 10
    assert found[0]["eval/drift/cosine"] == pytest.approx(1) and found[5]["eval/drift/cosine"] < 0.99999
    assert found[5]["feedback/loss_own"] != found[0]["feedback/loss_own"]
    assert [r["step"] for r in rows(ran) if "loss" in r] == list(range(1, TOTAL + 1))
    assert [s.title for s in page.run_sections(read(ran).runs)] == ["Training", "During training"]


def test_training_is_bit_identical_with_and_without(files, photos, ran, tmp_path, capsys):
    plain = config(files)
    assert train(plain, tmp_path)
    chex.assert_trees_all_equal(trained(plain, ran), trained(plain, tmp_path))
    without = [{k: v for k, v in r.items() if k in ("step", "loss", "grad_norm")} for r in rows(tmp_path)]
    assert without == [{k: r[k] for k in ("step", "loss", "grad_norm")} for r in rows(ran) if "loss" in r]


def test_a_resumed_run_logs_the_same(files, photos, ran, tmp_path, capsys, monkeypatch):
    """Step 4 was evaluated before its checkpoint: its row is kept, and only the last evaluation is repeated. A signal
    breaks that off, and the next start makes it. Tasks use the kernels that passed the check of the run's devices."""
    workdir = tmp_path / "run"
    shutil.copytree(ran, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(TOTAL))
    chosen = mock.Mock(wraps=compiler.chosen_kernels)
    monkeypatch.setattr(compiler, "chosen_kernels", chosen)
    with monkeypatch.context() as patch:
        patch.setattr(evaluator.Evaluator, "scalars", lambda *_: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(9)))
        assert not train(evaluating(files, photos), workdir)
    assert checkpoint.latest_step(workdir) == TOTAL and not (workdir / "done").exists()
    assert "the evaluation of step 5 is left to the next start" in capsys.readouterr().out
    assert train(evaluating(files, photos), workdir) and evaluations(workdir) == evaluations(ran)
    assert (workdir / "done").exists() and {call.args[2] for call in chosen.call_args_list} == {workdir}
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("evaluated step")]
    assert len(said) == 1 and said[0].startswith("evaluated step 5 in ")
    assert "feedback/gap_other" in said[0] and "drift/cosine" in said[0] and "by_timestep" not in said[0]


def test_the_command_finds_what_the_log_says(files, photos, ran):
    """The last row can be computed from the checkpoint; the initial encoder borrows the run's projection."""
    c = evaluating(files, photos)
    mesh = partition.make_mesh(c.mesh)
    tasks = {"feedback": c.eval.data[0].removeprefix("feedback=")}
    run = evaluator.Evaluator(c, mesh, tasks)
    places = {"clip": origins.find(f"{files}/clip", "--weights"), "tuned": origins.find(str(ran), "--weights")}
    clip, tuned = (encode.read(*place[:2], c, mesh) for place in places.values())
    lent, lender = encode.lend(places, mesh)
    weights = {"clip": clip._replace(params=lent, borrowed=lender), "tuned": tuned}
    for name, array in trained(c, ran).items():
        if name.startswith("visual_proj/"):
            np.testing.assert_array_equal(np.asarray(lent[name]), array)
            np.testing.assert_array_equal(np.asarray(tuned.params[name]), array)
    found = {label: [run.evaluate(run.model(label, encoder))] for label, encoder in weights.items()}
    results, _ = run.report(found)
    assert Task.model_validate(json.loads(json.dumps(results["feedback"]))).weights["tuned"].timesteps
    by_label = results["feedback"]["weights"]
    logged = evaluations(ran)[TOTAL]
    for metric, s in by_label["tuned"]["scores"].items():
        assert s["score"] == pytest.approx(logged[f"feedback/{metric}"], rel=1e-5, abs=1e-7), metric
    assert any("the one trained by tuned is used" in note for note in by_label["clip"]["notes"])
    assert not any("projection" in note for note in by_label["tuned"]["notes"])
    (comparison,) = results["feedback"]["comparisons"]
    assert comparison["scores"]["gap_other"]["difference"] != 0
    bare = run.tasks["feedback"].evaluate(run.model("clip", clip))
    assert "these weights have no visual_proj: the random one of config.seed=0 is used" in bare.results["notes"]


def test_time_of_an_evaluation_is_not_time_of_training(monkeypatch):
    now, writer = [0.0], mock.Mock()
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    progress = metrics.Progress(writer, 0, 4, 1, images=8)
    values = {"loss": 1.0, "grad_norm": 1.0, "lr": 0.1}
    for step in (1, 2, 3, 4):
        now[0] += 2
        progress.add(step, {k: jax.numpy.float32(v) for k, v in values.items()})
        progress.flush()
        if step == 2:
            now[0] += 1000
            progress.paused(1000)
    assert [call.args[1]["images_per_s"] for call in writer.write.call_args_list] == [4.0] * 4
