"""SmartCLIP: its logits written out, the recipe, and configs that do not fit together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from helpers import refused
from records import encoded
from specs import DINOV2

from diva_jax import config, demo
from diva_jax.common.errors import UserError
from diva_jax.data import inputs
from diva_jax.objectives import smartclip
from diva_jax.training.loop import Run


@pytest.mark.parametrize("seed", range(3))
def test_masked_cosines_written_out(seed):
    rng = np.random.default_rng(seed)
    n, d = rng.integers(2, 6), rng.integers(3, 9)
    x, y, m = rng.normal(size=(n + 1, d)), rng.normal(size=(n, d)), (rng.random((n, d)) > 0.4).astype(float)
    m[0] = 0  # Selects nothing.
    got = np.asarray(smartclip.masked_cosines(*(jnp.asarray(a, jnp.float32) for a in (x, y, m))))
    for i in range(n + 1):
        for j in range(1, n):
            a, b = m[j] * x[i], y[j]
            want = a @ b / np.linalg.norm(a) / np.linalg.norm(b) if m[j].any() else 0
            assert got[i, j] == pytest.approx(want, abs=1e-6)
    assert (got[:, 0] == 0).all()
    slope = jax.grad(lambda m: jnp.sum(smartclip.masked_cosines(jnp.asarray(x), jnp.asarray(y), m)))(jnp.asarray(m))
    assert np.isfinite(slope).all()


def test_the_published_recipe():
    c = config.default("vitl14", objective="smartclip")
    assert (c.backbone.text.context_length, c.backbone.text.kept_positions, c.batch_size) == (248, 20, 1024)
    p = small.program(c)
    assert p.arrays["text/pos_embed"].shape == (248, 768)
    rate = p.active(0)
    assert {n: rate[n] for n in ("mask_net/proj/kernel", "text/pos_embed")} == {
        "mask_net/proj/kernel": 1000.0,
        "text/pos_embed": 1.0,
    }
    warm = np.ceil(c.optim.warmup * c.steps)
    assert warm == 200 and p.objective.inputs["caption"].choose is inputs.first_sentences


def test_what_cannot_work_is_one_sentence(files, tmp_path):
    with pytest.raises(UserError, match="config.objective=smartclip trains a text tower, but the dinov2 backbone has"):
        small.program(config.default(DINOV2, objective="smartclip"))
    c = config.default(small.SPEC, objective="smartclip")
    c.update(batch_size=8)
    demo.write_byte_tokenizer(tmp_path / "tokenizer")
    c.smartclip.tokenizer = str(tmp_path / "tokenizer")
    c.backbone.source, c.data.path = str(files / "clip"), str(tmp_path / "classes")
    (tmp_path / "classes" / "a").mkdir(parents=True)
    (tmp_path / "classes" / "a" / "0.png").write_bytes(encoded(0))
    refused("has no captions, which the input 'caption' needs", Run, c, tmp_path / "run")
    c.data.path, c.backbone.text.kept_positions = str(files / "photos"), -1
    refused("context_length is 77 there and 248 in the config", lambda: Run(c, tmp_path / "run").load())
    assert not (tmp_path / "run" / "config.json").exists()
