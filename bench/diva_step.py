"""DIVA's train step of `diva_jax` and of PyTorch at several sizes, for cpu_vs_torch.py and gpu.py.

Both have the same architecture, images, number of draws, clip and optimizer (SGD with momentum), and random weights.
The PyTorch step consists of open_clip's vision tower, diffusers' U-Net and VAE, and autograd; as in the code of DIVA's
authors, each draw's backward pass follows its forward pass. tests/parity/test_torch_training.py shows that ten steps
of such a PyTorch step and of ours give the same weights.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

SIZES = ("tiny", "tenth", "full")
_DRAWS = 2
_TIMESTEPS = 1000


def config_of(size: str, batch: int, dtype: str):
    """The config of a size: "tiny", "tenth" (a tenth of the parameters), "full" (ViT-L/14, SD 2.1)."""
    from diva_jax import config
    from diva_jax.models import backbones
    from diva_jax.models.diffusion import presets

    spec, sd = backbones.TABLE["vitl14"], presets.preset("sd21_base")
    image = 512
    if size != "full":
        unet, vae, head, width, layers, image = {
            "tiny": ((16, 32, 32, 32), (16, 32, 32, 32), 8, 64, 3, 64),
            "tenth": ((96, 192, 384, 384), (40, 80, 160, 160), 32, 320, 12, 256),
        }[size]
        groups = 8
        sd["unet"] |= dict(
            block_out_channels=unet,
            attention_head_dim=tuple(n // head for n in unet),
            cross_attention_dim=width,
            norm_num_groups=groups,
        )
        sd["vae"] |= dict(block_out_channels=vae, norm_num_groups=groups)
        sd["text_encoder"] |= dict(hidden_size=width)
        spec = dataclasses.replace(
            spec, width=width, layers=layers, heads=width // head, mlp_dim=4 * width, embed_dim=width, image_size=112
        )
    c = config.default(spec, sd)
    c.update(dtype=dtype, frozen_dtype=dtype, batch_size=batch, accum=1)
    c.data.image_size = image
    return c


def images(c) -> np.ndarray:
    """One batch, uint8 [B, S, S, 3]."""
    s = c.data.image_size
    return np.random.default_rng(0).integers(0, 256, (c.batch_size, s, s, 3), np.uint8)


def _random(rng: np.random.Generator, name: str, like) -> np.ndarray:
    """Initial values: weights of variance 1 / (number of inputs), scales of one, other vectors of zero.

    By numpy, because a program that makes all arrays of a U-Net with jax takes minutes to compile on a CPU.
    """
    if name.endswith("/scale"):
        return np.ones(like.shape, np.float32)
    if len(like.shape) < 2:
        return np.zeros(like.shape, np.float32)
    return rng.standard_normal(like.shape, np.float32) / np.sqrt(np.prod(like.shape[:-1]))


def ours(c) -> Callable[[], float]:
    """A function that makes one step and returns the loss; its first call compiles."""
    import jax

    from diva_jax.training import partition
    from diva_jax.training.step import Program

    program = Program(c, partition.make_mesh(c.mesh, jax.devices()[:1]))
    rng = np.random.default_rng(0)
    arrays = {n: jax.device_put(_random(rng, n, a).astype(a.dtype), a.sharding) for n, a in program.arrays.items()}
    frozen = {n: arrays[n] for n in program.abstract_frozen()}
    state = program.init_state(arrays)
    arrays.clear()
    batch = {"image": images(c), "row": np.arange(c.batch_size, dtype=np.int32)}
    batch = jax.device_put(batch, program.batch_sharding)
    step = program.step(0)

    def run() -> float:
        nonlocal state
        state, metrics = step(state, frozen, batch)
        return float(metrics["loss"])

    return run


def theirs(c, device: str = "cpu", compiled: bool = False) -> Callable[[], float]:
    """The same of PyTorch; in bfloat16 frozen weights are held in it, and the trained ones in float32 with autocast."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from open_clip.transformer import QuickGELU, VisionTransformer

    from diva_jax.models import backbones

    s, d = backbones.spec_of(c), c.diffusion
    narrow = getattr(torch, c.frozen_dtype)
    vision = VisionTransformer(
        s.image_size, s.patch_size, s.width, s.layers, s.heads, s.mlp_dim / s.width,
        output_dim=s.embed_dim, act_layer=QuickGELU, output_tokens=True,
    ).to(device)  # fmt: skip
    visual_proj = torch.nn.Linear(s.embed_dim, d.unet.cross_attention_dim).to(device)
    unet = UNet2DConditionModel(**d.unet.to_dict()).requires_grad_(False).to(device, narrow)
    up = ("UpDecoderBlock2D",) * len(d.vae.block_out_channels)
    vae = AutoencoderKL(**(d.vae.to_dict() | {"up_block_types": up})).requires_grad_(False)
    del vae.decoder
    vae.to(device, narrow)
    text = torch.zeros(1, d.text_tokens, d.unet.cross_attention_dim, device=device)
    betas = torch.linspace(d.scheduler.beta_start**0.5, d.scheduler.beta_end**0.5, _TIMESTEPS, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0).float().to(device)
    mean, std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (s.mean, s.std))
    trained = [*vision.parameters(), *visual_proj.parameters()]
    optimizer = torch.optim.SGD(trained, lr=1e-6, momentum=0.9)
    picked = int(s.select.partition(":")[2])
    shape = (c.batch_size, 4, *(c.data.image_size // 8,) * 2)
    batch = torch.from_numpy(images(c)).to(device)

    def tokens(view):
        x = vision.conv1(view).flatten(2).transpose(1, 2)
        x = torch.cat([vision.class_embedding.expand(len(x), 1, -1), x], 1) + vision.positional_embedding
        return vision.ln_post(vision.transformer(vision.ln_pre(x))) @ vision.proj

    def latents_of(x):
        return vae.config.scaling_factor * vae.encode(x).latent_dist.mean.float()

    def loss_of(seen, latents, t, noise, indices):
        chosen = torch.gather(seen[:, 1:], 1, indices[:, :, None].expand(-1, -1, seen.shape[-1]))
        condition = visual_proj(torch.cat([seen[:, :1], chosen], 1)) + text
        a = abar[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
        pred = unet(noisy.to(narrow), t, condition.to(narrow)).sample
        return torch.nn.functional.mse_loss(pred.float(), noise)

    if compiled:
        tokens, latents_of, loss_of = (torch.compile(f) for f in (tokens, latents_of, loss_of))

    def run() -> float:
        optimizer.zero_grad()
        total = 0.0
        with torch.autocast(device, torch.bfloat16, enabled=narrow == torch.bfloat16):
            x = batch.permute(0, 3, 1, 2).float() / 255
            side = (s.image_size,) * 2
            view = torch.nn.functional.interpolate(x, side, mode="bicubic", align_corners=False, antialias=True)
            view = (view - mean) / std
            with torch.no_grad():
                latents = latents_of((2 * x - 1).to(narrow))
            seen = tokens(view)
            # One pass of the tower for all draws, as ours: their gradients are summed before its backward pass.
            given = seen.detach().requires_grad_()
            for _ in range(_DRAWS):
                t = torch.randint(0, _TIMESTEPS, (c.batch_size,), device=device)
                indices = torch.randint(0, s.patches, (c.batch_size, picked), device=device)
                loss = loss_of(given, latents, t, torch.randn(shape, device=device), indices)
                (loss / _DRAWS).backward()
                total = total + loss.detach() / _DRAWS
        seen.backward(given.grad)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return float(total)

    return run
