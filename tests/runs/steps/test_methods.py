"""KUEA, SmartCLIP, un2CLIP and DCR: equations written out, recipes, draws, views, and what cannot work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from helpers import refused, within
from records import encoded
from specs import DINOV2

from diva_jax import config, demo, objectives
from diva_jax.common.errors import UserError
from diva_jax.data import inputs, preprocess
from diva_jax.models import backbones
from diva_jax.objectives import smartclip
from diva_jax.objectives.dcr import contrast
from diva_jax.training import partition, workdirs
from diva_jax.training.loop import Run


def test_at_the_start_the_distance_to_the_original_is_zero():
    p = small.program(small.kuea_config(kuea__kernel="cosine", kuea__kernel_params="faithful"))
    arrays = small.kuea_arrays(p)
    arrays |= {n: arrays[n.replace("original/", "vision/")] for n in arrays if n.startswith("original/")}
    batch = small.batch(p, 0)

    def losses(trained):
        return p.skeleton.merge({**arrays, **trained}).loss(batch, None)

    trained = {n: arrays[n] for n in p.trained}
    (value, metrics), grads = jax.jit(jax.value_and_grad(losses, has_aux=True))(trained)
    within(metrics["loss_clean"], 1e-9)
    assert metrics["loss_kernel"] > 0
    assert value == pytest.approx(float(0.5 * metrics["loss_kernel"]), abs=1e-8)
    assert all(np.isfinite(g).all() for g in grads.values())


def test_the_teacher_has_its_own_input_or_the_backbones():
    exact = small.kuea_config()
    p, other = small.program(exact), small.program(config.faithful(exact.copy_and_resolve_references()))
    found, alone = p.objective.inputs, other.objective.inputs
    assert set(found) == {"image", "teacher"} and set(alone) == {"image"}
    assert [(x.size, x.resize) for x in (found["image"], found["teacher"], alone["image"])] == [
        (21, 0),
        (18, 24),
        (21, 0),
    ]
    batch, module = small.batch(p, 0), p.skeleton.merge(small.kuea_arrays(p))
    want, _ = module.forward(*(preprocess.to_float(batch[name]) for name in ("image", "teacher")))
    np.testing.assert_allclose(module.loss(batch, None)[0], want, rtol=1e-6)


def test_a_teacher_that_is_no_dinov2_is_refused_before_anything_is_written(files, tmp_path):
    c = config.faithful(small.kuea_config())
    c.batch_size, c.backbone.source, c.data.path = 8, str(files / "clip"), str(files / "photos")
    c.kuea.teacher.source = str(files / "clip")
    run = Run(c, tmp_path / "run")
    with pytest.raises(UserError, match="is of another architecture than config.kuea.teacher: arch is 'vit' there"):
        run.load()
    assert not (tmp_path / "run" / "config.json").exists()


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


def made(**options):
    """(module with random arrays, its program)."""
    c = small.unclip_config()
    c.unclip.update(options)
    p = small.program(c)
    arrays = small.random_arrays(p)
    return p.skeleton.merge(arrays), p


@pytest.mark.parametrize("option, mode", [("ldm", "aligned"), ("processor", "exact")])
def test_the_view_of_the_encoder(option, mode):
    """tests/parity compares the aligned one with kornia's formula."""
    module, _ = made(clip_view=option)
    pixels = jax.random.uniform(jax.random.key(0), (2, 30, 30, 3))
    s = module.spec
    want = preprocess.backbone_view(pixels, s.image_size, s.mean, s.std, mode)
    np.testing.assert_array_equal(module.views(pixels)[1], want)


def test_draws_depend_on_their_own_key_alone():
    module, _ = made(embed_drop=0.5)
    keys = jax.random.split(jax.random.key(3), 40)
    whole, part = module.draw(keys, (2, 3, 4)), module.draw(keys[7:9], (2, 3, 4))
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(a[7:9], b)
    assert 8 < int(whole.keep.sum()) < 32
    assert whole.timesteps.shape == (40,) and len(np.unique(whole.timesteps)) > 30


def test_losses_of_the_conditions():
    module, p = made(embed_noise="random", embed_drop=0.9)
    image = small.batch(p, 0)["image"][:2]
    batch = {"image": image, "other": image[::-1]}
    edges = np.array([0, 400, 1000])
    losses = jax.jit(lambda batch: module.condition_losses(batch, jax.random.split(jax.random.key(0), 2), edges))
    found = {name: np.asarray(x) for name, x in losses(batch).items()}
    assert {x.shape for x in found.values()} == {(2, 2)}
    assert not np.allclose(found["own"], found["other"]) and not np.allclose(found["own"], found["text"])
    same = losses(batch | {"other": image})
    np.testing.assert_allclose(same["own"], same["other"], rtol=1e-5)


def test_statistics_come_from_the_generator(files, tmp_path):
    small.write_unclip(tmp_path / "generator")
    c = small.unclip_config(unclip__embed_noise="level3")
    c.backbone.source, c.diffusion.source = str(files / "clip"), str(tmp_path / "generator")
    p = small.program(c)
    names = ["image_normalizer/mean", "image_normalizer/std"]
    arrays, origins = workdirs.initial_arrays(p, names, every_source=False)
    rng, d = np.random.default_rng(5), small.SPEC.embed_dim
    np.testing.assert_array_equal(arrays[names[0]], rng.normal(size=(1, d)).astype(np.float32))
    np.testing.assert_array_equal(arrays[names[1]], rng.uniform(0.5, 1.5, (1, d)).astype(np.float32))
    assert origins["image_normalizer"]["source"] == ["diffusion_pytorch_model.safetensors"]
    (tmp_path / "generator" / "image_normalizer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="image_normalizer has no weights"):
        workdirs.initial_arrays(p, names, every_source=False)


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
    nothing = preprocess.Jitter(*(jnp.stack([x, x]) for x in nothing))
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
