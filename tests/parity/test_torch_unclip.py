"""Ten optimizer steps of un²CLIP against the same written in plain PyTorch, and its views and latents alone."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import small_unclip
import torch
import torch.nn.functional as F
from flax import nnx
from helpers import close, relative_error

from diva_jax.data import preprocess
from diva_jax.models import backbones
from diva_jax.models.diffusion.vae import VAE, VAEConfig
from diva_jax.models.layers import Keys
from diva_jax.training.step import image_keys
from diva_jax.weights import clip, diffusers, names

STEPS = 10


def part_tensors(p, arrays, part: str, table) -> dict[str, torch.Tensor]:
    """One part's arrays under its original library's names."""
    state = {
        path[1:]: var.replace(arrays[name])
        for name, (path, var) in p.skeleton.variables.items()
        if name.startswith(part + "/")
    }
    return {k: torch.from_numpy(v.copy()) for k, v in names.to_torch(nnx.from_flat_state(state), table).items()}


def kornia_resize(x: torch.Tensor, size: int) -> torch.Tensor:
    """kornia.geometry.resize(x, size, "bicubic", align_corners=True, antialias=True) of square images, smaller ones."""
    sigma = max((x.shape[-1] / size - 1) / 2, 0.001)
    taps = int(max(4 * sigma, 3))
    taps += taps % 2 == 0
    at = torch.arange(taps) - taps // 2
    g = torch.exp(-(at**2) / (2 * sigma**2)).to(x)
    kernel = torch.outer(g, g) / g.sum() ** 2
    b, c, *_ = x.shape
    padded = F.pad(x, (taps // 2,) * 4, mode="reflect")
    blurred = F.conv2d(padded, kernel.expand(c, 1, taps, taps), groups=c)
    return F.interpolate(blurred, (size, size), mode="bicubic", align_corners=True)


class TorchUnclip:
    """The objective in PyTorch, from open_clip's and diffusers' own modules, for every option."""

    def __init__(self, p, arrays):
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from open_clip.transformer import QuickGELU, VisionTransformer

        self.config, self.spec = p.config, backbones.spec_of(p.config)
        self.options = p.config.unclip
        s, d = self.spec, p.config.diffusion
        self.vision = VisionTransformer(
            s.image_size,
            s.patch_size,
            s.width,
            s.layers,
            s.heads,
            s.mlp_dim / s.width,
            output_dim=s.embed_dim,
            act_layer=QuickGELU,
        )
        tensors = part_tensors(p, arrays, "vision", clip.vision_table(s))
        self.vision.load_state_dict({k.removeprefix("visual."): v for k, v in tensors.items()})
        self.unet = UNet2DConditionModel(**d.unet.to_dict()).requires_grad_(False)
        self.unet.load_state_dict(part_tensors(p, arrays, "unet", diffusers.UNET))
        vae = d.vae.to_dict() | {"up_block_types": ("UpDecoderBlock2D",) * len(d.vae.block_out_channels)}
        self.vae = AutoencoderKL(**vae).requires_grad_(False)
        missing = self.vae.load_state_dict(part_tensors(p, arrays, "vae", diffusers.VAE), strict=False)
        assert all(k.startswith(("decoder.", "post_quant")) for k in missing.missing_keys)
        self.text = torch.from_numpy(np.array(arrays["text_context"]))
        self.mean, self.std = torch.zeros(1, s.embed_dim), torch.ones(1, s.embed_dim)
        if "image_normalizer/mean" in arrays:
            self.mean, self.std = (torch.from_numpy(np.array(arrays[f"image_normalizer/{k}"])) for k in ("mean", "std"))
        betas = torch.linspace(d.scheduler.beta_start**0.5, d.scheduler.beta_end**0.5, 1000, dtype=torch.float64) ** 2
        self.abar = torch.cumprod(1 - betas, 0).float()
        remaining = [math.cos((r / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for r in range(1001)]
        betas = [min(1 - b / a, 0.999) for a, b in zip(remaining, remaining[1:], strict=False)]
        self.levels = torch.cumprod(1 - torch.tensor(betas), 0)

    def labels(self, embed, drawn):
        noise, level = self.options.embed_noise, torch.zeros_like(drawn["levels"])
        if noise != "none":
            level = drawn["levels"] if noise == "random" else level
            a = self.levels[level][:, None]
            scaled = (embed - self.mean) / self.std
            embed = (a.sqrt() * scaled + (1 - a).sqrt() * drawn["embed_noise"]) * self.std + self.mean
        half = embed.shape[1] // 2
        angles = level[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
        c = torch.cat([embed, angles.cos(), angles.sin()], 1)
        return c * drawn["keep"][:, None] if self.options.embed_drop else c

    def loss(self, image, drawn) -> torch.Tensor:
        x = torch.from_numpy(image).float().permute(0, 3, 1, 2) / 255
        size, o = self.spec.image_size, self.options
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (self.spec.mean, self.spec.std))
        if o.clip_view == "ldm":
            view = (kornia_resize(2 * x - 1, size) + 1) / 2
        else:
            view = F.interpolate(x, (size, size), mode="bicubic", align_corners=False, antialias=True)
        posterior = self.vae.encode(2 * x - 1).latent_dist
        noise, n = (drawn[k].permute(0, 3, 1, 2) for k in ("noise", "posterior"))
        z = posterior.mean + posterior.std * n if o.latents == "sample" else posterior.mean
        z = self.vae.config.scaling_factor * z
        a = self.abar[drawn["timesteps"]].view(-1, 1, 1, 1)
        noisy = a.sqrt() * z + (1 - a).sqrt() * noise
        labels = self.labels(self.vision((view - mean) / std), drawn)
        text = self.text.expand(len(x), -1, -1)
        pred = self.unet(noisy, drawn["timesteps"], text, class_labels=labels).sample
        if o.target == "v":
            return F.mse_loss(pred, a.sqrt() * noise - (1 - a).sqrt() * z)
        return F.mse_loss(a.sqrt() * pred + (1 - a).sqrt() * noisy, noise)


def torch_train(model: TorchUnclip, c, draws_of) -> None:
    params = list(model.vision.parameters())
    o = c.optim
    opt = torch.optim.AdamW(params, lr=o.lr, betas=(o.b1, o.b2), eps=o.eps, weight_decay=0.0)
    warm = math.ceil(o.warmup * c.steps)

    def factor(step):
        return step / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (c.steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(opt, factor)
    for step in range(STEPS):
        opt.zero_grad()
        model.loss(*draws_of(step)).backward()
        torch.nn.utils.clip_grad_norm_(params, o.clip)
        opt.step()
        schedule.step()


@pytest.mark.parametrize(
    "options",
    [
        dict(target="eps", embed_noise="random", embed_drop=0.25),
        dict(target="v", latents="mean", clip_view="ldm"),
    ],
    ids=["random", "ldm"],
)
def test_ten_steps(options):
    c = small_unclip.small_config(batch_size=6, accum=2, steps=14, optim__warmup=0.15, optim__eps=1e-4)
    c.unclip.update(options)
    p = small.program(c)
    arrays = small.random_arrays(p)
    if "image_normalizer/std" in arrays:
        arrays["image_normalizer/std"] = 0.7 + jnp.square(arrays["image_normalizer/std"])
    model = TorchUnclip(p, arrays)
    state = p.init_state({n: jnp.copy(arrays[n]) for n in p.trained})
    frozen = {n: arrays[n] for n in p.abstract_frozen()}
    key, batches = np.asarray(state["key"]), [small.batch(p, i) for i in range(STEPS)]
    module = p.skeleton.merge(arrays)
    side = c.data.image_size // module.vae.config.downscale
    draw = jax.jit(lambda keys: module.draw(keys, (side, side, 4)))

    def draws_of(step):
        drawn = draw(image_keys(key, jnp.int32(step), jnp.arange(c.batch_size)))._asdict()
        drawn = {k: torch.from_numpy(np.array(v)) for k, v in drawn.items()}
        return np.asarray(batches[step]["image"]), {
            k: v if v.is_floating_point() else v.long() for k, v in drawn.items()
        }

    kept = np.stack([draws_of(i)[1]["keep"].numpy() for i in range(STEPS)])
    assert kept.all() == (not c.unclip.embed_drop)
    step_fn = p.step(0)
    for batch in batches:
        state, _ = step_fn(state, frozen, batch)
    torch_train(model, c, draws_of)
    table = clip.vision_table(model.spec)
    ours, start = (part_tensors(p, a, "vision", table) for a in (state["params"], arrays))
    theirs = {f"visual.{k}": v.detach() for k, v in model.vision.named_parameters()}
    assert set(theirs) == set(ours)
    for name, want in theirs.items():
        close(ours[name], want, 1e-4, name)
        # The bound means something only where training moved the tensor by much more.
        assert relative_error(start[name], want) > 1e-3, name


@pytest.mark.parametrize("n, size", [(24, 21), (50, 14), (17, 30)])
def test_aligned_resize(n, size):
    x = np.random.default_rng(n).uniform(size=(2, n, n, 3)).astype(np.float32)
    torch_x = torch.from_numpy(x).permute(0, 3, 1, 2)
    larger = F.interpolate(torch_x, (size, size), mode="bicubic", align_corners=True)
    want = (kornia_resize(torch_x, size) if size < n else larger).permute(0, 2, 3, 1)
    close(preprocess.aligned_resize(jnp.asarray(x), size), want, 2e-6)


def test_posterior_sample():
    """As diffusers' DiagonalGaussianDistribution, of moments that reach its clamp."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    class Fixed(VAE):
        def moments(self, images):
            return images

    vae = Fixed(VAEConfig(block_out_channels=(4, 4), norm_num_groups=2), rngs=Keys(0))
    rng = np.random.default_rng(0)
    moments = rng.normal(size=(2, 3, 5, 4)).astype(np.float32) * np.float32([1, 1, 40, 9])
    noise = rng.normal(size=(2, 3, 5, 2)).astype(np.float32)
    theirs = DiagonalGaussianDistribution(torch.from_numpy(moments).permute(0, 3, 1, 2))
    want = theirs.mean + theirs.std * torch.from_numpy(noise).permute(0, 3, 1, 2)
    ours = vae.encode(jnp.asarray(moments), jnp.asarray(noise))
    close(ours / vae.config.scaling_factor, want.permute(0, 2, 3, 1), 2e-6)
