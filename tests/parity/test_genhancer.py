"""GenHancer against plain PyTorch: ten steps over both stages, another grid, and FLUX's encoder from every layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import torch
from helpers import close
from torch_genhancer import Model
from torch_objectives import begin, check_trained, column, random_program

from diva_jax.models import backbones
from diva_jax.models.diffusion.vae import VAE, FluxVAEConfig
from diva_jax.models.layers import Keys, abstract
from diva_jax.objectives import genhancer
from diva_jax.training import partition
from diva_jax.training.step import image_keys
from diva_jax.weights import flux, names, writers


def as_torch(arrays) -> dict[str, torch.Tensor]:
    return {n: torch.from_numpy(np.array(a)) for n, a in arrays.items()}


def test_ten_steps():
    """Five of stage 1, five of stage 2 with a new optimizer; every trained tensor decays, the rate is constant."""
    c = small.genhancer_config(
        accum=2,
        genhancer__stage2="all",
        genhancer__stage1_lr=2e-3,
        genhancer__lora__dropout=0.0,
        optim__lr=2e-3,
        optim__weight_decay=0.1,
        optim__warmup_steps=2,
        optim__clip=0.5,
        # As AdamW divides by the gradient's own size, a tiny gradient's rounding would show through 1e-8.
        optim__eps=1e-4,
    )
    p, arrays = random_program(c)
    state, frozen, key = begin(p, arrays)
    spec = backbones.spec_of(c)
    module = p.skeleton.merge(arrays)
    tensors = {n: t.requires_grad_(n in p.trained) for n, t in as_torch(arrays).items()}
    model = Model(tensors, module.flow_config, spec.heads, spec.patch_size, lora_scale=2.0)
    draw = jax.jit(lambda keys, pixels: (d := module.draw(keys, (14, 14, 3))[0], module.latents(pixels, d.posterior)))
    clipped = 0
    for number, stage in enumerate(p.stages):
        active = p.active(number)
        if number:
            state["opt"] = p.init_opt(number, state["params"])
        options = dict(betas=(0.9, 0.999), eps=1e-4, weight_decay=0.1)
        optimizer = torch.optim.AdamW([tensors[n] for n in active], lr=stage.lr, **options)
        warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(i / 2, 1))
        step_fn = p.step(number)
        for step in range(stage.start, stage.end):
            batch = small.batch(p, step)
            pixels = batch["image"].astype(jnp.float32) / 255
            drawn, latents = draw(image_keys(key, jnp.int32(step), batch["row"]), pixels)
            view = (torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2) - column(spec.mean)) / column(spec.std)
            given = (torch.from_numpy(np.array(x)) for x in (latents, drawn.t, drawn.noise))
            optimizer.zero_grad()
            loss, _ = model.forward(model.clip(view), *given)
            loss.backward()
            clipped += float(torch.nn.utils.clip_grad_norm_([tensors[n] for n in active], 0.5)) > 0.5
            optimizer.step()
            warm.step()
            state, metrics = step_fn(state, frozen, batch)
            np.testing.assert_allclose(float(metrics["loss"]), loss.item(), rtol=5e-5)
    assert clipped >= 3
    assert set(p.active(1)) == set(p.trained)
    check_trained(arrays, state["params"], {n: tensors[n] for n in p.trained})


def test_loss_and_gradients_on_a_grid_that_is_not_square():
    """3 x 5 tokens; the gradients of projectors and denoiser."""
    c = small.genhancer_config(genhancer__stage2="none")
    p, rng, spec = small.program(c), np.random.default_rng(2), backbones.spec_of(c)
    # Near the initial values, with which little rounding is amplified.
    _, fresh = partition.disassemble(genhancer.Objective(c, rngs=Keys(4)))
    arrays = {n: jnp.asarray(a + 0.02 * rng.normal(size=a.shape), jnp.float32) for n, a in fresh.items()}
    pixels = rng.uniform(size=(3, 28, 28, 3)).astype(np.float32)
    latents, t, noise = (rng.normal(size=s).astype(np.float32) for s in ((3, 6, 10, 3), (3,), (3, 15, 12)))
    drawn = genhancer.GenHancerDraws(None, jnp.asarray(t), jnp.asarray(noise))
    mine = {n: arrays[n] for n in p.active(0)}

    def forward(trained):
        return p.skeleton.merge(arrays, trained).forward(pixels, latents, drawn)

    (loss, seen), grads = jax.jit(jax.value_and_grad(forward, has_aux=True))(mine)
    tensors = {n: x.requires_grad_(n in mine) for n, x in as_torch(arrays).items()}
    model = Model(tensors, p.skeleton.merge(arrays).flow_config, spec.heads, spec.patch_size)
    view = (torch.from_numpy(pixels).permute(0, 3, 1, 2) - column(spec.mean)) / column(spec.std)
    want, theirs = model.forward(model.clip(view), *map(torch.from_numpy, (latents, t, noise)))
    want.backward()
    np.testing.assert_allclose(loss, want.item(), rtol=2e-5)
    close(seen["pred"], theirs["pred"].detach(), 2e-5)
    ours, theirs = (np.concatenate([np.ravel(x) for x in g]) for g in (
        [grads[n] for n in mine], [tensors[n].grad for n in mine]
    ))  # fmt: skip
    close(ours, theirs, 2e-5)


SIZES = dict(latent_channels=5, block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """(diffusers' model, the folder of its pipeline, a folder with the same weights in FLUX's own file)."""
    from diffusers import AutoencoderKL

    root = tmp_path_factory.mktemp("flux")
    torch.manual_seed(0)
    kind = dict(down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)
    shift = dict(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    model = AutoencoderKL(**SIZES, **kind, **shift).requires_grad_(False)
    model.save_pretrained(root / "pipeline" / "vae")
    config = FluxVAEConfig(**SIZES)
    ours = loaded(root / "pipeline", config)
    tensors = names.to_torch(ours, flux.VAE)
    convolutions = {n: a[:, :, None, None] if "attn_1" in n and a.ndim == 2 else a for n, a in tensors.items()}
    convolutions["decoder.conv_in.weight"] = np.zeros((1,), np.float32)
    (root / "own").mkdir()
    writers.write_safetensors(root / "own" / "ae.safetensors", convolutions)
    return model, root


def loaded(source, config) -> VAE:
    from flax import nnx

    graph, state = nnx.split(abstract(lambda rngs: VAE(config, rngs=rngs)))
    opened = flux.vae(str(source), config, "config.genhancer.vae").open()
    return nnx.merge(graph, opened.fill(state, lambda path, array, want: jnp.asarray(array)))


@pytest.mark.parametrize("where", ["pipeline", "pipeline/vae", "own", "own/ae.safetensors"])
def test_encoder_from_every_layout(layouts, where):
    model, root = layouts
    images = np.random.default_rng(0).uniform(-1, 1, (2, 28, 36, 3)).astype(np.float32)
    latents = model.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).latent_dist.mean
    want = 0.3611 * (latents - 0.1159)
    ours = loaded(root / where, FluxVAEConfig(**SIZES)).encode(jnp.asarray(images))
    close(np.asarray(ours).transpose(0, 3, 1, 2), want, 2e-5)
