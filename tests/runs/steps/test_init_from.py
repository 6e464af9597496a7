"""--init_from: a run that takes parameters from another run's checkpoint, and what its own checkpoints say of it."""

import jax
import numpy as np
import pytest
import small
from flax import nnx

from diva_jax import demo
from diva_jax.common.errors import UserError
from diva_jax.data.photos import pack_photos
from diva_jax.models.diffusion.vae import VAE
from diva_jax.models.layers import Keys
from diva_jax.objectives import genhancer
from diva_jax.training import workdirs
from diva_jax.training.loop import Run
from diva_jax.weights import flux, names, writers


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """fields -> config, whose files exist."""
    root = tmp_path_factory.mktemp("files")
    pack_photos(root / "photos", count=8, per_shard=8)
    demo.write_clip(root / "clip", small.SPEC_28)
    vae = VAE(genhancer._vae(small.genhancer_config().genhancer.vae), rngs=Keys(3))
    writers.write_safetensors(root / "ae.safetensors", names.to_torch(nnx.state(vae), flux.VAE))

    def config(**fields):
        c = small.genhancer_config(**fields)
        c.backbone.source, c.genhancer.vae.source = str(root / "clip"), str(root / "ae.safetensors")
        c.data.path, c.data.threads, c.log.tensorboard = str(root / "photos"), 1, False
        return c

    return config


def saved(run, step: int, change: float) -> dict:
    """Saves a checkpoint of a run whose trained parameters are changed, without training; returns what was loaded."""
    loaded = run.load()
    params = {n: a + change for n, a in loaded.state["params"].items()}
    meta = {"sources": loaded.origins, "config": {}} | ({"init_from": loaded.parent} if loaded.parent else {})
    state = {**loaded.state, "params": params, "step": loaded.state["step"] + step}
    loaded.checkpoints.save(step, state, run.batches.get_state() | {"batches": step}, meta, wait=True)
    loaded.checkpoints.close()
    run.lock.close()
    run.batches.close()
    return {**loaded.frozen, **loaded.state["params"]}


def test_stage_two_starts_from_stage_one_and_resumes(make, tmp_path, capsys):
    first = Run(make(genhancer__stage2="none"), tmp_path / "one")
    before = saved(first, 3, 0.5)
    second = make(genhancer__stage1_steps=0, seed=4)
    run = Run(second, tmp_path / "two", f"{tmp_path}/one:3")
    after = saved(run, 2, 0.25)
    taken = [n for n in before if n.startswith(("project_", "denoiser/"))]
    assert f"{len(taken)} of {len(after)} parameters are those of --init_from={tmp_path}/one, step 3" in (
        capsys.readouterr().out
    )
    for name in after:
        if name in taken:
            np.testing.assert_array_equal(after[name], before[name] + 0.5, err_msg=name)
        elif "/lora/" not in name:
            np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    # Resuming: what is frozen comes from the first run again, whatever --init_from says.
    resumed = Run(second, tmp_path / "two", "nowhere")
    loaded = resumed.load()
    for name in taken:
        np.testing.assert_array_equal(loaded.frozen[name], after[name], err_msg=name)
    for name, array in loaded.state["params"].items():
        np.testing.assert_array_equal(array, after[name] + 0.25, err_msg=name)
    assert loaded.parent["step"] == 3 and loaded.parent["frozen"] == sorted(taken)
    loaded.checkpoints.close()
    resumed.batches.close()
    assert set(workdirs.RunAt.open(tmp_path / "two").towers()) == {"vision"}


def test_a_run_of_other_models_is_refused(make, tmp_path):
    saved(Run(make(genhancer__stage2="none"), tmp_path / "one"), 3, 0.0)
    other = make(genhancer__stage1_steps=0)
    with pytest.raises(UserError, match="--init_from=.*:7 has no checkpoint"):
        Run(other, tmp_path / "two", f"{tmp_path}/one:7")
    parent = workdirs.Parent.open(f"{tmp_path}/one")
    with pytest.raises(UserError, match="no parameter there .* has the name and shape of one of this config"):
        parent.matching({"unet/kernel": jax.ShapeDtypeStruct((3, 3), np.float32)})
    with pytest.raises(UserError, match="not the checkpoint that this run began with"):
        workdirs.Parent.recorded(parent.record([]) | {"sha256": "0"})
    assert not (tmp_path / "two").exists()
