"""DCR: groups and tiles, the contrast written out, views, and what each stage trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from diva_jax import config, objectives
from diva_jax.data import jitter
from diva_jax.models import backbones
from diva_jax.objectives.dcr import contrast
from diva_jax.training import partition


@pytest.mark.parametrize(
    ("images", "group", "tile", "chunks", "together"),
    [(16, 16, 17, 16, 17), (16, 16, 40, 8, 17), (16, 16, 8, 2, 1), (6, 3, 100, 1, 4), (6, 3, 3, 2, 1), (2, 2, 1, 2, 1)],
)
def test_a_tile_holds_at_most_its_passes(images, group, tile, chunks, together):
    objective = small.program(small.dcr_config(dcr__group=group, dcr__tile=tile, batch_size=images)).objective
    assert objective.tiles(images) == (chunks, together)
    assert images // chunks * together <= tile


def test_contrast_is_the_formula():
    """Against the sums written out in float64, with logits past the range of exp in float32."""
    rng = np.random.default_rng(0)
    predicted, goal = rng.normal(size=(5, 4, 2, 3, 1)), rng.normal(size=(5, 2, 3, 1))
    anchors, tau = np.array([0, 1, 2, 0, 1]), 0.004
    found = contrast(*(jnp.asarray(x, jnp.float32) for x in (predicted, goal)), jnp.asarray(anchors), tau)
    for i, a in enumerate(anchors):
        unit = [p.ravel() / np.linalg.norm(p) for p in (*predicted[i], goal[i])]
        s = np.array([unit[a] @ u for u in unit]) / tau
        z = np.log(sum(np.exp(x.astype(np.longdouble)) for k, x in enumerate(s) if k != a))
        np.testing.assert_allclose(found.losses[i], [z - s[3], z - s[4]], rtol=2e-5, atol=1e-4)
        np.testing.assert_allclose(found.others[i], s[:3], rtol=1e-5, atol=1e-4)
    zero = jax.grad(lambda x: contrast(x, jnp.ones((1, 2, 2, 1)), jnp.array([0]), 0.1).losses.sum())(
        jnp.zeros((1, 3, 2, 2, 1))
    )
    assert np.isfinite(zero).all()


@pytest.mark.parametrize("spec", [small.SPEC_28, small.SIGLIP_28], ids=["vit", "siglip"])
def test_each_stage_trains_its_own(spec):
    p = small.program(small.dcr_config(spec))
    assert [(s.name, s.start, s.end, s.lr) for s in p.stages] == [("projector", 0, 2, 1e-4), ("tower", 2, 5, 1e-3)]
    first, second = (set(p.active(i)) for i in (0, 1))
    assert {n.split("/")[0] for n in first} == {"projector"} and len(first) == 6
    adapted = {n.rpartition("/lora/")[0] for n in second if "/lora/" in n}
    block = {f"vision/blocks/{i}/{layer}" for i in (0, 1) for layer in ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2")}
    pool = {"vision/attn_pool/mlp/fc1", "vision/attn_pool/mlp/fc2"}
    assert adapted == block | ({"vision/proj"} if spec is small.SPEC_28 else pool)
    biases = {n for n in second if n.endswith("/bias")}
    inert = {"vision/attn_pool/proj/bias"} if spec is small.SIGLIP_28 else set()
    assert biases == {f"{n}/bias" for n in adapted if n != "vision/proj"} | inert
    assert second == biases | {f"{n}/lora/{x}" for n in adapted for x in "ab"}
    qkv = p.arrays["vision/blocks/0/attn/qkv/lora/a"]
    assert qkv.shape == (3, spec.width, 3)
    assert set(p.towers.shapes) == {"vision"}  # Merged, and checked to be those of the backbone.


def test_published_recipe():
    c = config.default("vitl14", objective="dcr")
    o = c.optim
    assert (o.name, o.lr, o.weight_decay, o.clip) == ("adamw", 1e-5, 0.01, 1.0)
    assert (o.schedule, o.decay_all) == ("constant", True)
    assert (c.batch_size, c.dcr.group, c.data.image_size, c.diffusion.prompt) == (256, 16, 224, "")
    stages = objectives.stages(c)
    assert [(s.steps, s.lr) for s in stages] == [(100_000, 1e-4), (4600, 1e-5)]
    lora = c.dcr.lora
    assert (lora.rank, lora.alpha, lora.dropout, lora.biases) == (16, 16.0, 0.1, True)
    switches = ("target", "plus_space", "tower_norm", "text_mask", "schedule_dtype", "loss_dtype", "stage1_loss")
    config.faithful(c)
    assert all(c.dcr[s] == "faithful" for s in switches)
    p = small.program(config.default("vitl14", objective="dcr"))
    sizes = {True: 0, False: 0}
    for name in p.active(1):
        sizes["/lora/" in name] += p.arrays[name].size
    assert sizes == {True: 7_106_560, False: 221_184}
    # 17 passes, each at 28 x 28 latents; the attention over pixels shrinks more than the rest.
    passes = p.flops()["unet"] / (17 * (28 / 64) ** 2 * 1.671e12)
    assert 0.8 < passes < 1


def test_normalisation_and_the_space_of_the_jitter():
    pixels = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 28, 28, 3)), jnp.float32)
    nothing = (jnp.arange(4), jnp.array([1.0, 1, 1, 0]), jnp.array([0, 0, 28, 28]), jnp.array(False), jnp.array(False))
    nothing = jitter.Draw(*(jnp.stack([x, x]) for x in nothing))
    view, plus = small.program(small.dcr_config(small.SIGLIP_28)).objective.views(pixels, nothing)
    np.testing.assert_allclose(view, 2 * pixels - 1, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(plus, view, rtol=1e-4, atol=1e-5)
    upside_down = nothing._replace(vflip=jnp.array([True, True]))
    _, flipped = small.program(small.dcr_config(small.SIGLIP_28)).objective.views(pixels, upside_down)
    np.testing.assert_allclose(flipped, view[:, ::-1], rtol=1e-4, atol=1e-5)
    faithful = small.dcr_config(small.SIGLIP_28, dcr__tower_norm="faithful", dcr__plus_space="faithful")
    view, plus = small.program(faithful).objective.views(pixels, nothing)
    mean, std = np.array(backbones.OPENAI_MEAN), np.array(backbones.OPENAI_STD)
    np.testing.assert_allclose(view, (pixels - mean) / std, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(plus, np.clip(view, 0, 1), rtol=1e-4, atol=1e-5)


def test_groups_are_consecutive_images():
    """The loss of two groups is the mean of that of each with itself, in one program."""
    p = small.program(small.dcr_config(batch_size=8))
    module = p.skeleton.merge(small.random_arrays(p))
    pixels = jnp.asarray(np.random.default_rng(1).uniform(size=(8, 28, 28, 3)), jnp.float32)
    drawn = module.draw(jax.random.split(jax.random.key(0), 8), (14, 14, 4))
    loss = jax.jit(lambda *given: module.forward(*given)[0])
    twice = [jax.tree.map(lambda a, i=i: jnp.concatenate([a[i : i + 4]] * 2), (pixels, drawn)) for i in (0, 4)]
    np.testing.assert_allclose(loss(pixels, drawn), np.mean([loss(*given) for given in twice]), rtol=2e-5)


def test_projector_alone_reconstructs():
    """The mean squared error of one pass per image."""
    c = small.dcr_config(dcr__projector_only=True, dcr__stage1_loss="exact", dcr__tile=3)
    config.validate(c, 1)
    p = small.program(c)
    assert [s.name for s in p.stages] == ["projector"] and p.objective.conditions == 1
    module = p.skeleton.merge(small.random_arrays(p))
    pixels = jnp.asarray(np.random.default_rng(1).uniform(size=(4, 28, 28, 3)), jnp.float32)
    drawn = module.draw(jax.random.split(jax.random.key(0), 4), (14, 14, 4))
    value, seen = jax.jit(module.forward)(pixels, drawn)
    np.testing.assert_allclose(value, np.mean((seen["predicted"][:, 0] - drawn.noise) ** 2), rtol=1e-5)
    assert seen["predicted"].shape == (4, 1, 14, 14, 4)
    assert set(partition.scales(p.stages[0].trainable, p.arrays).values()) == {0.0, 1.0}
