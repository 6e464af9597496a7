"""Checkpoints whose files were changed after the save, and full disks: found out, and the newest good one stays."""

import json
import resource
import shutil

import jax
import mutations
import numpy as np
import pytest
import report_samples as samples
from helpers import failed, refused
from jax.sharding import NamedSharding, PartitionSpec
from mutations import outcome

from diva_jax import api, config
from diva_jax.training import checkpoint, workdirs
from diva_jax.weights import formats

pytestmark = pytest.mark.attack


# Some in every run of the tests, all of them in `make attack`.
SEEDS = [*range(16), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(16, 97))]
META = {"sources": {"vision": {"source": ["x"], "sha256": "0"}}, "config": {"steps": 9}}


def state(step: int) -> dict:
    rng = np.random.default_rng(step)
    a, b = rng.normal(size=(5, 7, 3)).astype(np.float32), rng.normal(size=(11,)).astype(np.float16)
    numbers = {"step": np.int32(step), "key": np.arange(2, dtype=np.uint32)}
    return {"params": {"a/kernel": a, "b": b}, "opt": {"mu": a * 2}, **numbers}


def abstract(step: int) -> dict:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype, sharding=here), state(step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    with checkpoint.Checkpoints(folder) as checkpoints:
        for step in (3, 6, 9):
            checkpoints.save(step, state(step), {"batches": step}, META, wait=True)
    return folder


@pytest.fixture
def workdir(saved, tmp_path):
    """With what an unfinished save of a running trainer has written so far, which no reader removes."""
    shutil.copytree(saved, tmp_path / "run")
    unfinished = tmp_path / "run/checkpoints/12.orbax-checkpoint-tmp-1/state.orbax-checkpoint-tmp-2"
    unfinished.mkdir(parents=True)
    (unfinished / "half").write_text("x")
    return tmp_path / "run"


def content(folder) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def whole(found: checkpoint.Restored) -> None:
    assert found.data == {"batches": found.step} and found.meta == META
    jax.tree.map(np.testing.assert_array_equal, found.state, state(found.step))


def mutate(folder, rng) -> str:
    """Changes a bit, half of the time of the arrays, or fields of the description; cuts a file; removes one or more."""
    files, what = sorted(f for f in folder.rglob("*") if f.is_file()), int(rng.integers(10))
    arrays = [f for f in files if f.parent.name == "d" and "state" in f.parts]
    file = (arrays if what <= 2 else files)[rng.integers(len(arrays if what <= 2 else files))]
    data = bytearray(file.read_bytes())
    if what <= 4 and data:
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        file.write_bytes(data)
    elif what <= 6:
        description = folder / "_CHECKPOINT_METADATA"
        tree, said = mutations.changed(rng, json.loads(description.read_bytes()))
        description.write_text(json.dumps(tree))
        return f"{what} {said}"
    elif what == 7:
        file.write_bytes(data[: int(rng.integers(len(data) + 1))])
    elif what == 8:
        file.unlink()
    else:
        shutil.rmtree(folder / ["state", "data", "meta", ""][rng.integers(4)])
        folder.mkdir(exist_ok=True)
    return f"{what} {file.relative_to(folder)}"


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_restored_is_what_was_saved(workdir, seed):
    """Where a checkpoint cannot be, it is set aside, and orbax's manager saves another."""
    what = mutate(workdir / "checkpoints" / "9", np.random.default_rng(seed))
    before = content(workdir)
    found = checkpoint.restore_newest(workdir, abstract)
    whole(found)
    assert found.step == 9 or (found.step == 6 and list(found.damaged) == [9]), what
    checkpoint.restore(workdir, 6, abstract(6))
    assert what[0] not in "56" or "_CHECKPOINT_METADATA" in found.damaged.get(9, "_CHECKPOINT_METADATA")
    if params := outcome(lambda: checkpoint.restore_params(workdir, 9, jax.devices()[0]), "step 9"):
        jax.tree.map(np.testing.assert_array_equal, params, (state(9)["params"], META))
    assert content(workdir) == before
    if found.step == 6:
        for name in ("9", "9-1", "9-2"):
            assert checkpoint.set_aside(workdir, 9) == workdir / "damaged" / name
            assert checkpoint.steps(workdir) == [3, 6]
            (workdir / "checkpoints" / "9").mkdir()
        (workdir / "checkpoints" / "9").rmdir()
    with checkpoint.Checkpoints(workdir) as checkpoints:
        checkpoints.save(12, state(12), {"batches": 12}, META, wait=True)
    assert checkpoint.latest_step(workdir) == 12, what


def test_the_checksum_sees_any_single_change():
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float16, np.int32, np.uint8, np.bool_, jax.numpy.bfloat16, np.float64):
        with jax.enable_x64(dtype == np.float64):
            for shape in ((), (1,), (37,), (6, 5), (3, 4, 5, 2)):
                a = np.asarray(rng.normal(size=shape) * 50).astype(dtype)
                before = checkpoint.checksums({"x": a})
                assert before == checkpoint.checksums({"x": np.array(a)})
                for _ in range(3):
                    b, place = np.array(a), int(rng.integers(a.nbytes))
                    if dtype == np.bool_:
                        b = np.where(np.arange(b.size).reshape(shape) == place, ~b, b)
                    else:
                        b.reshape(-1).view(np.uint8)[place] ^= 1 << int(rng.integers(8))
                    assert checkpoint.checksums({"x": b}) != before, (dtype, shape)


def test_the_checksum_is_that_of_any_sharding():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    a = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    sums = {
        checkpoint.checksums([jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))])["[0]"]
        for spec in ((), ("x",), ("y", None), ("x", "y"), (("x", "y"),), (None, "y"))
    }
    assert len(sums) == 1 and checkpoint.checksums([a[::-1]])["[0]"] not in sums


def test_an_empty_folder_or_a_copy_is_no_checkpoint(workdir):
    (workdir / "checkpoints" / "99").mkdir()
    shutil.copytree(workdir / "checkpoints" / "6", workdir / "checkpoints" / "19")
    (workdir / "checkpoints" / "notes").mkdir()
    (workdir / "checkpoints" / "29").symlink_to("gone")
    assert checkpoint.latest_step(workdir) == 9 and checkpoint.steps(workdir) == [3, 6, 9]
    assert {step for step, why in checkpoint.damages(workdir).items() if why} == {19, 29, 99}
    found = checkpoint.restore_newest(workdir, abstract)
    whole(found)
    assert found.step == 9 and "copy of the checkpoint of step 6" in found.damaged[19]
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "checkpoints").symlink_to(workdir / "gone")
    refused("checkpoints is a link to a folder that is not there", checkpoint.latest_step, workdir)


def test_a_reader_takes_another_one_where_a_trainer_deletes_its_checkpoint(workdir, monkeypatch):
    (workdir / "config.json").write_text('{"steps": 9}')
    (workdir / "checkpoints" / "12").mkdir()  # As long as not all of it is deleted.
    chosen, choose = iter([12, 15]), workdirs.choose_step
    monkeypatch.setattr(workdirs, "choose_step", lambda *given: next(chosen, None) or choose(*given))
    run = workdirs.RunAt.open(workdir)
    assert run.step == 9
    jax.tree.map(np.testing.assert_array_equal, dict(run.params), state(9)["params"])


def test_where_all_are_damaged_nothing_is_begun_anew(workdir):
    for step in (3, 6, 9):
        (workdir / "checkpoints" / str(step) / "state" / "manifest.ocdbt").write_bytes(b"")
    before = content(workdir)
    says = r"none of the 3 checkpoints .*manifest.ocdbt is missing or empty.*begin anew"
    refused(says, checkpoint.restore_newest, workdir, abstract)
    assert content(workdir) == before and checkpoint.restore_newest(workdir / "nothing", abstract) is None


def test_checkpoints_without_checksums_are_read_with_a_note(workdir, capsys):
    path = workdir / "checkpoints/9/meta/metadata"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k in META}))
    found = checkpoint.restore_newest(workdir, abstract)
    whole(found)
    assert found.step == 9 and "saved without checksums" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[]", "{" * 5000, '{"steps": 9'])
def test_a_broken_config_is_taken_from_the_newest_checkpoint(workdir, capsys, text):
    (workdir / "config.json").write_text(text)
    assert workdirs.read_config(workdir).to_dict() == META["config"]
    assert "the config in the newest checkpoint is used" in capsys.readouterr().out
    shutil.rmtree(workdir / "checkpoints")
    refused("config.json, line 1 is not JSON|config.json: it is", workdirs.read_config, workdir)


def test_the_newest_step_that_is_good_is_chosen(workdir, capsys):
    (workdir / "checkpoints/9/state/_METADATA").write_bytes(b"")
    assert workdirs.choose_step(workdir) == 6
    assert "the checkpoint of step 9 is damaged (state/_METADATA is missing or empty)" in capsys.readouterr().out
    refused("--step=9: that checkpoint is damaged .* use one of 3, 6", workdirs.choose_step, workdir, 9)


@pytest.fixture
def limited():
    """Files of this process can have 100 kB; writing more than that fails as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def large_state(step: int) -> dict:
    rng = np.random.default_rng(step)
    many = {f"b{i}": jax.numpy.asarray(rng.normal(size=(7, 30)), np.float32) for i in range(20)}
    return {"params": {"a": jax.numpy.asarray(rng.normal(size=(400, 301)), np.float32), **many}, "step": np.int32(step)}


def test_a_checkpoint(tmp_path, monkeypatch, limited, capfd):
    monkeypatch.setattr(checkpoint, "_RETRY_AFTER_S", (0.0, 0.0))
    with checkpoint.Checkpoints(tmp_path) as checkpoints, checkpoint.Checkpoints(tmp_path / "new") as first:
        checkpoints.save(3, large_state(3), {"batches": 3}, {}, wait=True)
        limited()
        failed("step 6: .* there is no earlier one: make room", first.save, 6, large_state(6), {}, {}, wait=True)
        says = r"step 6: no checkpoint can be written .* one is of step 3: make room"
        failed(says, checkpoints.save, 6, large_state(6), {"batches": 6}, {}, wait=True)
    assert checkpoint.steps(tmp_path) == [3] and [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["3"]
    # What else is printed is dropped by the command, see `cli._on_unraisable`.
    assert not [line for line in capfd.readouterr().err.splitlines() if "ERROR" in line or "Error writing" in line]


def test_an_export(tmp_path, limited):
    def write():
        with formats.new_folder(tmp_path / "out") as folder:
            formats.write_safetensors(folder / "model.safetensors", {"a": np.ones((400, 301), np.float32)})

    limited()
    refused("out cannot be written .*: give a folder with enough room", write)
    assert not list(tmp_path.iterdir())


def test_an_evaluation_prints_its_scores(tmp_path, monkeypatch, limited, capsys):
    found = samples.write_evaluation(tmp_path / "other", [], drift=samples.drift_task())
    monkeypatch.setattr(api.evaluator, "run", lambda *_: (found, [{"text": "a" * 200_000}], []))
    limited()
    says = "out cannot be written .File too large.: use a folder with write access and room"
    refused(says, api.evaluate, config.default(), "hub/a", {"drift": "a"}, out=tmp_path / "out")
    assert "cosine" in capsys.readouterr().out and not list((tmp_path / "out").iterdir())


def test_what_a_killed_export_has_left_is_removed_by_the_next(tmp_path):
    with formats.new_folder(tmp_path / "out") as running:
        left = tmp_path / ".out.abcd1234.unfinished"
        shutil.copytree(running, left)
        (left / "half").write_text("x")
        other = tmp_path / ".out2.abcd1234.unfinished"
        other.mkdir()
        with formats.new_folder(tmp_path / "out") as second:
            assert running.exists() and second.exists() and not left.exists() and other.exists()
        shutil.rmtree(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == [other.name, "out"]
