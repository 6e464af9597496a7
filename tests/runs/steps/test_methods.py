"""Single methods: equations written out, draws, views, what each stage trains, and what cannot work."""

import contextlib
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import small
from helpers import close, refused
from records import encoded
from specs import DINOV2

from diva_jax import config, demo
from diva_jax.data import preprocess
from diva_jax.models import adapters, backbones
from diva_jax.models.backbones import OPENAI_MEAN, OPENAI_STD
from diva_jax.models.diffusion import flow
from diva_jax.models.layers import Keys
from diva_jax.objectives import judge, smartclip
from diva_jax.objectives.dcr import contrast
from diva_jax.training import partition, workdirs
from diva_jax.training.loop import Run
from diva_jax.weights import formats
from diva_jax.world import models, records


def made(c):
    p = small.program(c)
    return p.skeleton.merge(small.random_arrays(p)), p


def uniform(count: int, size: int = 28):
    return jnp.asarray(np.random.default_rng(1).uniform(size=(count, size, size, 3)), jnp.float32)


def test_the_teacher_has_its_own_input_or_the_backbones():
    module, p = made(small.kuea_config())
    found, alone = p.objective.inputs, small.program(config.faithful(small.kuea_config())).objective.inputs
    sizes = {n: (x.size, x.resize, x.resize_mode) for n, x in found.items()}
    assert sizes == {"image": (21, 0, "shortest"), "teacher": (18, 24, "shortest")}
    assert {n: (x.size, x.resize) for n, x in alone.items()} == {"image": (21, 0)}
    batch = small.batch(p, 0)
    want, _ = module.forward(*(preprocess.to_float(batch[name]) for name in ("image", "teacher")))
    np.testing.assert_allclose(module.loss(batch, None)[0], want, rtol=1e-6)


def test_a_mask_that_selects_nothing():
    """Its cosines are 0, and gradients finite; test_torch_training.py has the others."""
    rng = np.random.default_rng(0)
    x, y, m = (jnp.asarray(rng.normal(size=(n, 7)), jnp.float32) for n in (5, 4, 4))
    cosines = lambda m: smartclip.masked_cosines(x, y, m)  # noqa: E731
    found = cosines(m.at[0].set(0))
    assert found.shape == (5, 4) and (found[:, 0] == 0).all() and (found[:, 1:] != 0).all()
    assert np.isfinite(jax.grad(lambda m: cosines(m).sum())(m.at[0].set(0))).all()


def test_states_of_the_texts_of_classes_are_kept(tmp_path, monkeypatch):
    """With them the step has no text encoder of the generator, and the verdict is the same."""
    names = ["red ring", "blue cross", "red  ring", "green star", "small heart", "red cross and blue ring"]
    (tmp_path / "classes.json").write_text(json.dumps(names))
    c = models.base_config("judge")
    c.update(steps=1, batch_size=8)
    c.judge.update(texts="classes", classes=str(tmp_path / "classes.json"), count=5, beta=100.0)
    c.data.update(path=records.path(3, count=20), threads=1)
    found, keys = [], jax.random.split(jax.random.key(4), 8)
    for limit in (len(names) + 1, len(names)):
        monkeypatch.setattr(judge, "_MAX_KEPT_TEXTS", limit)
        run = Run(c, tmp_path / str(limit))
        arrays, _ = workdirs.initial_arrays(run.program, every_source=True)
        (batch,) = itertools.islice(run.batches, 1)
        ask = jax.jit(lambda arrays, b, k, p=run.program: p.skeleton.merge(arrays).judge(b, b["image"] / 255, k))
        found.append(ask(arrays, {n: batch[n] for n in run.program.objective.inputs}, keys))
        assert any(n.startswith("text_encoder/") for n in arrays) == (limit == len(names))
        assert (batch["conditions"][:, :5, 0] < 0).any()
        run.batches.close()
    for kept, encoded_in_step in zip(*found, strict=True):
        assert np.ptp(kept) > 0.01
        np.testing.assert_allclose(kept, encoded_in_step, atol=2e-5)


def test_what_cannot_work_is_one_sentence(files, tmp_path):
    dinov2 = config.default(DINOV2, objective="smartclip")
    refused("config.objective=smartclip trains a text tower, but the dinov2 backbone has", small.program, dinov2)
    c = config.default(small.SPEC, objective="smartclip")
    demo.write_byte_tokenizer(tmp_path / "tokenizer")
    c.batch_size, c.smartclip.tokenizer = 8, str(tmp_path / "tokenizer")
    c.backbone.source, c.data.path = str(files / "clip"), str(tmp_path / "classes")
    (tmp_path / "classes" / "a").mkdir(parents=True)
    (tmp_path / "classes" / "a" / "0.png").write_bytes(encoded(0))
    refused("has no captions, which the input 'caption' needs", Run, c, tmp_path / "run")
    c.data.path, c.backbone.text.kept_positions = str(files / "photos"), -1
    refused("context_length is 77 there and 248 in the config", lambda: Run(c, tmp_path / "run").load())
    c = config.faithful(small.kuea_config(batch_size=8))
    c.backbone.source = c.kuea.teacher.source = str(files / "clip")
    c.data.path = str(files / "photos")
    says = "is of another architecture than config.kuea.teacher: arch is 'vit' there"
    refused(says, lambda: Run(c, tmp_path / "run").load())
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_missing_tokenizer_names_the_field_that_is_read(files):
    fields = {"contrast": "caption", "smartclip": "caption", "judge": "texts"}
    for (section, name), made_by in zip(fields.items(), ("comclip", "smartclip", "judge"), strict=True):
        c = getattr(small, f"{made_by}_config")(backbone__source=str(files / "clip"))
        says = f"bpe_simple_vocab_16e6.txt.gz; put them there or set --config.{section}.tokenizer=FOLDER"
        refused(says, small.program(c).objective.inputs[name].tokenizer)


@pytest.mark.parametrize("option", ["ldm", "processor", "faithful", "exact"])
def test_views_of_the_encoder_and_the_teacher(option):
    """tests/parity compares `backbone_view` with PyTorch's functions and kornia's formula."""
    pixels, mode = uniform(2, 30), "aligned" if option == "ldm" else "exact"
    if option in ("ldm", "processor"):
        module, _ = made(small.unclip_config(unclip__clip_view=option))
        like, size, view = module.spec, module.spec.image_size, module.view(pixels)
    else:
        module = small.program(small.kuea_config(kuea__teacher_norm=option)).objective
        like = module.taught_by if option == "exact" else module.spec
        size, view = module.taught_by.image_size, module.teacher_view(pixels)
    np.testing.assert_array_equal(view, preprocess.backbone_view(pixels, size, like.mean, like.std, mode))


def test_losses_of_the_conditions():
    module, p = made(small.unclip_config(unclip__embed_noise="random", unclip__embed_drop=0.9))
    keys, image = jax.random.split(jax.random.key(0), 2), small.batch(p, 0)["image"][:2]
    losses = jax.jit(lambda batch: module.condition_losses(batch, keys, np.array([0, 400, 1000])))
    found = {name: np.asarray(x) for name, x in losses({"image": image, "other": image[::-1]}).items()}
    assert {x.shape for x in found.values()} == {(2, 2)}
    assert not np.allclose(found["own"], found["other"]) and not np.allclose(found["own"], found["text"])
    same = losses({"image": image, "other": image})
    np.testing.assert_allclose(same["own"], same["other"], rtol=1e-5)


def test_statistics_come_from_the_generator(tmp_path):
    rng = np.random.default_rng(5)
    c = small.unclip_config(unclip__embed_noise="level3", diffusion__source=str(tmp_path))
    statistics = {n: rng.uniform(0.5, 1.5, (1, small.SPEC.embed_dim)).astype(np.float32) for n in ("mean", "std")}
    file = tmp_path / "image_normalizer" / "diffusion_pytorch_model.safetensors"
    file.parent.mkdir()
    formats.write_safetensors(file, statistics)
    wanted, p = [f"image_normalizer/{n}" for n in statistics], small.program(c)
    arrays, origins = workdirs.initial_arrays(p, wanted, every_source=False)
    for name, found in zip(statistics, map(arrays.get, wanted), strict=True):
        np.testing.assert_array_equal(found, statistics[name])
    assert origins["image_normalizer"]["source"] == [file.name]
    file.unlink()
    refused("image_normalizer has no weights", workdirs.initial_arrays, p, wanted, every_source=False)


# What is drawn as whole numbers from 0 on -> how many there are, and what is standard normal.
WHOLE = dict(timesteps=1000, levels=1000, token_indices=small.SPEC.patches, keep=2)
DRAWN = WHOLE | dict.fromkeys(("noise", "posterior", "embed_noise", "t"))


@pytest.mark.parametrize("name", ["diva", "unclip", "dcr", "genhancer"])
def test_draws_are_independent_and_depend_on_their_own_key_alone(name):
    """Uniform, tokens with replacement, or standard normal; test_inputs.py has DCR's jitter."""
    c, columns = getattr(small, f"{name}_config")(**{"unclip__embed_drop": 0.5} if name == "unclip" else {}), []
    draw, keys = jax.jit(small.program(c).objective.draw, static_argnums=1), jax.random.split(jax.random.key(3), 20_000)
    whole, some = (jax.tree_util.tree_leaves_with_path(draw(k, (2, 2, 1))) for k in (keys, keys[7:9]))
    for (path, drawn), (_, alone) in zip(whole, some, strict=True):
        if (field := jax.tree_util.keystr(path[-1:], simple=True)) in DRAWN:
            # DIVA has two draws of each image.
            drawn, alone = (np.moveaxis(np.asarray(a), int(name == "diva"), 0) for a in (drawn, alone))
            np.testing.assert_array_equal(drawn[7:9], alone)
            columns.append(drawn.reshape(len(keys), -1))
            x = drawn.ravel()
            test = scipy.stats.chisquare(np.bincount(x)) if DRAWN[field] else scipy.stats.kstest(x, "norm")
            assert test.pvalue > 1e-3 and DRAWN[field] in (None, len(np.unique(x))), field
    # The correlation of 20,000 independent pairs has a standard deviation of 0.007.
    together = np.corrcoef(np.concatenate(columns, axis=1).T)
    assert len(together) > 4 and np.abs(together - np.eye(len(together))).max() < 0.04


KEYS = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 8))


@pytest.mark.parametrize("name, passes", [("dcr", 2), ("genhancer", 1)])
def test_adapters_drop_in_every_pass_of_the_tower(name, passes, monkeypatch):
    p, given = small.program(getattr(small, f"{name}_config")(batch_size=8)), []
    monkeypatch.setattr(adapters, "dropout", lambda keys: given.append(keys) or contextlib.nullcontext())
    jax.eval_shape(lambda arrays, *rest: p.skeleton.merge(arrays).loss(*rest), p.arrays, p.abstract_batch(), KEYS)
    assert len({id(k) for k in given if k is not None}) == passes


def test_times_of_genhancer_are_rounded_where_that_is_faithful():
    module, _ = made(small.genhancer_config(genhancer__time_precision="faithful", genhancer__scale_factor=0.5))
    drawn, _ = module.draw(jax.random.split(jax.random.key(0), 4), (14, 14, 3))
    _, seen = jax.jit(module.forward)(uniform(4), drawn.posterior, drawn)
    np.testing.assert_allclose(seen["t"], 1 / (1 + np.exp(-drawn.t / 2)), rtol=1e-6)
    want = module.denoiser.time_in(flow.timestep_code(seen["t"].astype(jnp.bfloat16)).astype(jnp.float32))
    close(seen["dit.time_in"], want, 1e-5)


# (objective, fields of its config, by quantity its dtype where models compute in bfloat16).
ROUNDED = json.loads(Path(__file__).with_name("rounded.json").read_text())


@pytest.mark.parametrize("name, fields, dtypes", ROUNDED)
def test_what_bfloat16_rounds(name, fields, dtypes):
    fields = dict(batch_size=8, dtype="bfloat16", frozen_dtype="bfloat16") | fields
    p = small.program(getattr(small, f"{name}_config")(**fields))

    def forward(arrays, *given):
        module = p.skeleton.merge(arrays)
        return module.forward(*module.draw_for(*given))

    value, seen = jax.eval_shape(forward, p.arrays, p.abstract_batch(), KEYS)
    assert value.dtype == jnp.float32 and {n: str(seen[n].dtype) for n in dtypes} == dtypes
    kinds = {p.objective.unet.time_embedding.linear_1.dtype, *(p.arrays[n].dtype for n in p.trained)}
    assert kinds == {jnp.float32.dtype}
    assert p.arrays["unet/conv_in/kernel"].dtype == p.objective.unet.conv_in.dtype == jnp.bfloat16
    abar = np.asarray(p.objective.alphas_cumprod(), np.float64)
    assert (len(np.unique(abar[:100])), abar[1] == 1) == ((28, True) if len(fields) > 3 else (100, False))


TILES = [(16, 16, 17, 16, 17), (16, 16, 40, 8, 17), (16, 16, 8, 2, 1)]
TILES += [(6, 3, 100, 1, 4), (6, 3, 3, 2, 1), (2, 2, 1, 2, 1)]


@pytest.mark.parametrize(("images", "group", "tile", "chunks", "together"), TILES)
def test_a_tile_holds_at_most_its_passes(images, group, tile, chunks, together):
    objective = small.program(small.dcr_config(dcr__group=group, dcr__tile=tile, batch_size=images)).objective
    assert objective.tiles(images) == (chunks, together) and images // chunks * together <= tile


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
    zero, goal = jnp.zeros((1, 3, 2, 2, 1)), jnp.ones((1, 2, 2, 1))
    assert np.isfinite(jax.grad(lambda x: contrast(x, goal, jnp.array([0]), 0.1).losses.sum())(zero)).all()


def test_each_stage_of_dcr_trains_its_own():
    """Of a SigLIP, whose head's output has a trained bias and no adapter; the golden files have CLIP's gradients."""
    p = small.program(small.dcr_config(spec=small.SIGLIP_28))
    assert [(s.name, s.start, s.end, s.lr) for s in p.stages] == [("projector", 0, 2, 1e-4), ("tower", 2, 5, 1e-3)]
    first, second = (set(p.active(i)) for i in (0, 1))
    assert {n.split("/")[0] for n in first} == {"projector"} and len(first) == 6
    layers = [f"blocks/{i}/{layer}" for i in (0, 1) for layer in ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2")]
    layers = [f"vision/{layer}" for layer in [*layers, "attn_pool/mlp/fc1", "attn_pool/mlp/fc2"]]
    biases = {f"{n}/bias" for n in [*layers, "vision/attn_pool/proj"]}
    assert second == biases | {f"{n}/lora/{x}" for n in layers for x in "ab"}
    assert p.arrays["vision/blocks/0/attn/qkv/lora/a"].shape == (3, small.SIGLIP_28.width, 3)
    assert set(p.towers.shapes) == {"vision"}  # Merged, and checked to be those of the backbone.


def test_what_each_stage_of_genhancer_trains():
    def tiny(**fields):
        return small.program(small.genhancer_config(dtype="bfloat16", **fields))

    generator = {"project_clip", "project_t5", "denoiser"}
    for stage2, parts in (("only", {"vision"}), ("all", generator | {"vision"})):
        p = tiny(genhancer__stage2=stage2)
        assert [{n.split("/")[0] for n in p.active(i)} for i in (0, 1)] == [generator, parts]
        assert {p.arrays[n].dtype for n in p.trained} == {jnp.dtype("float32")}
        assert not any("norm" in n or "embed" in n for n in p.active(1) if n.startswith("vision/"))
    p = tiny(genhancer__stage2="none")
    assert [s.name for s in p.stages] == ["stage1"] and not any("lora" in n for n in p.arrays)
    p = tiny(genhancer__stage1_steps=0, frozen_dtype="bfloat16")
    assert [s.name for s in p.stages] == ["stage2"]
    dtypes = {(n.split("/")[0], str(a.dtype)) for n, a in p.arrays.items() if n.startswith(("denoiser/", "vae/"))}
    assert dtypes == {("denoiser", "bfloat16"), ("vae", "float32")}
    assert p.objective.vae.encoder.conv_in.dtype == jnp.float32
    # The switches of SigLIP; faithful: tanh's GELU in the tower; the head's output has a trained bias and no adapter.
    base = "vision/attn_pool/proj"
    for value, activation, matrices in (("exact", "gelu", "ab"), ("faithful", "gelu_tanh", "")):
        p = tiny(spec=small.SIGLIP_28, genhancer__siglip_head_out=value, genhancer__siglip_gelu=value)
        out = {n for n in p.active(1) if n.startswith(f"{base}/")}
        assert out == {f"{base}/bias", *(f"{base}/lora/{m}" for m in matrices)}
        assert p.objective.vision.blocks[0].mlp.activation == activation
        pooled = {n for n in p.active(1) if n.startswith("vision/attn_pool/")} - out
        assert all("/mlp/fc" in n for n in pooled) and len(pooled) == 6


@pytest.mark.parametrize("norm, stats", [("exact", [backbones.HALF] * 2), ("faithful", [OPENAI_MEAN, OPENAI_STD])])
def test_siglip_has_its_own_mean_or_openais(norm, stats):
    """In both views, here of black images, which no jitter changes; the golden files have a CLIP."""
    module = small.program(small.dcr_config(spec=small.SIGLIP_28, dcr__tower_norm=norm)).objective
    jitter, black = preprocess.draw_jitter(jax.random.split(jax.random.key(0), 2), 28), jnp.zeros((2, 28, 28, 3))
    for view in module.views(black, jitter):
        np.testing.assert_allclose(view, preprocess.normalise(black, *stats), rtol=1e-5)


def test_groups_are_consecutive_images():
    """The loss of two groups is the mean of that of each with itself, in one program."""
    module, _ = made(small.dcr_config(batch_size=8))
    pixels, drawn = uniform(8), module.draw(jax.random.split(jax.random.key(0), 8), (14, 14, 4))
    forward = jax.jit(module.forward)
    loss, seen = forward(pixels, drawn)
    twice = [jax.tree.map(lambda a, i=i: jnp.concatenate([a[i : i + 4]] * 2), (pixels, drawn)) for i in (0, 4)]
    np.testing.assert_allclose(loss, np.mean([forward(*given)[0] for given in twice]), rtol=2e-5)
    np.testing.assert_array_equal(seen["goal"], drawn.noise)  # Which this U-Net predicts.


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_projector_alone_reconstructs(kind):
    c = small.dcr_config(dcr__projector_only=True, dcr__stage1_loss="exact", dcr__tile=3)
    c.diffusion.scheduler.prediction_type = kind
    config.validate(c, 1)
    module, p = made(c)
    assert [s.name for s in p.stages] == ["projector"] and p.objective.tiles(4)[1] == 1
    pixels, drawn = uniform(4), module.draw(jax.random.split(jax.random.key(0), 4), (14, 14, 4))
    value, seen = jax.jit(module.forward)(pixels, drawn)
    goal = module.target(seen["latents"], drawn.noise, drawn.timesteps)
    assert np.array_equal(goal, drawn.noise) == (kind == "epsilon")
    np.testing.assert_allclose(value, np.mean((seen["predicted"][:, 0] - goal) ** 2), rtol=1e-5)
    assert seen["predicted"].shape == (4, 1, 14, 14, 4)
    assert set(partition.scales(p.stages[0].trainable, p.arrays).values()) == {0.0, 1.0}


def test_tokens_of_a_grid_that_is_not_square():
    """The golden files have square ones: channels of 2 x 2 patches, positions in raster order, rotations by rows."""
    x = np.random.default_rng(0).normal(size=(1, 6, 10, 3))
    for n, (i, j) in enumerate(itertools.product(range(3), range(5))):
        want = x[0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].transpose(2, 0, 1).ravel()
        np.testing.assert_array_equal(flow.pack(jnp.asarray(x))[0, n], np.float32(want))
        assert tuple(flow.token_positions((3, 5))[1 + n]) == (0, i, j)
    cos, _ = flow.rotations(flow.FlowConfig(width=24, heads=2, axes=(4, 2, 6), theta=10), (3, 5))
    np.testing.assert_allclose(cos[-1], np.cos([0, 0, 2, *(4 * 10 ** (-np.arange(3) / 3))]), rtol=1e-6)


def test_initial_values_are_those_of_pytorch():
    """U(+-1/sqrt(fan in)) for weights and biases, DIVA's too; zero_out clears modulations and the output alone."""
    sizes = dict(width=36, heads=3, axes=(4, 2, 6), in_channels=12, vector_dim=20, text_dim=28)
    _, arrays = partition.disassemble(flow.Flow(flow.FlowConfig(**sizes), rngs=Keys(1)))
    of_diva = jax.jit(lambda: partition.disassemble(small.program(small.diva_config()).init_module().visual_proj)[1])
    arrays |= {f"visual_proj/{n}": a for n, a in of_diva().items()}
    for name, array in arrays.items():
        if name.endswith("scale"):
            np.testing.assert_array_equal(array, 1.0)
            continue
        bound = arrays[name.rsplit("/", 1)[0] + "/kernel"].shape[0] ** -0.5
        assert 0.8 * bound < float(jnp.abs(array).max()) <= bound, name
        assert abs(float(array.std()) / bound - 3**-0.5) < 0.15, name
    _, zeroed = partition.disassemble(flow.Flow(flow.FlowConfig(**sizes, zero_out=True), rngs=Keys(1)))
    clear = {n for n, a in zeroed.items() if not np.any(np.asarray(a))}
    assert clear == {n for n in arrays if "_mod/" in n or "modulation" in n.lower() or "final_layer/linear" in n}
