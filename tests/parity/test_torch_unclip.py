"""Ten optimizer steps of un²CLIP against the same written in plain PyTorch, and its views and latents alone."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import small
import torch
import torch.nn.functional as F
from helpers import close
from torch_objectives import (
    Generator,
    check_trained,
    column,
    drawn_by,
    part_tensors,
    random_program,
    to_torch,
    torch_train,
    vision_tower,
)

from diva_jax.data import preprocess
from diva_jax.models import backbones
from diva_jax.weights import clip

STEPS = 10


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
        self.options, self.spec, self.generator = p.config.unclip, backbones.spec_of(p.config), Generator(p, arrays)
        self.vision, s = vision_tower(p, arrays, self.spec), self.spec
        self.mean, self.std = torch.zeros(1, s.embed_dim), torch.ones(1, s.embed_dim)
        if "image_normalizer/mean" in arrays:
            self.mean, self.std = (torch.from_numpy(np.array(arrays[f"image_normalizer/{k}"])) for k in ("mean", "std"))
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
        if o.clip_view == "ldm":
            view = (kornia_resize(2 * x - 1, size) + 1) / 2
        else:
            view = F.interpolate(x, (size, size), mode="bicubic", align_corners=False, antialias=True)
        noise, t, generator = drawn["noise"], drawn["timesteps"], self.generator
        z = generator.latents(2 * x - 1, drawn["posterior"] if o.latents == "sample" else 0.0)
        noisy, a = generator.add_noise(z, noise, t), generator.abar[t].view(-1, 1, 1, 1)
        labels = self.labels(self.vision((view - column(self.spec.mean)) / column(self.spec.std)), drawn)
        pred = generator.unet(noisy, t, generator.text.expand(len(x), -1, -1), class_labels=labels).sample
        if o.target == "v":
            return F.mse_loss(pred, a.sqrt() * noise - (1 - a).sqrt() * z)
        return F.mse_loss(a.sqrt() * pred + (1 - a).sqrt() * noisy, noise)


@pytest.mark.parametrize(
    "options",
    [
        dict(target="eps", embed_noise="random", embed_drop=0.25),
        dict(target="v", latents="mean", clip_view="ldm"),
    ],
    ids=["random", "ldm"],
)
def test_ten_steps(options):
    c = small.unclip_config(batch_size=6, accum=2, steps=14, optim__warmup=0.15, optim__eps=1e-4)
    c.unclip.update(options)
    p, arrays = random_program(c)
    if "image_normalizer/std" in arrays:
        arrays["image_normalizer/std"] = 0.7 + jnp.square(arrays["image_normalizer/std"])
    model, run = TorchUnclip(p, arrays), small.train(c, STEPS, arrays=lambda _: arrays)
    drawn = drawn_by(run, arrays)
    assert all(drawn(i)[1].keep.all() for i in range(STEPS)) == (not c.unclip.embed_drop)

    def backward(step):
        image, draws = drawn(step)
        model.loss(image, to_torch(draws._asdict())).backward()

    torch_train(model.vision.parameters(), c, STEPS, backward)
    table = clip.vision_table(model.spec)
    ours, start = (part_tensors(p, a, "vision", table) for a in (run.states[-1]["params"], arrays))
    check_trained(start, ours, {f"visual.{k}": v for k, v in model.vision.named_parameters()})


@pytest.mark.parametrize("n, size", [(24, 21), (50, 14), (17, 30)])
def test_aligned_resize(n, size):
    x = np.random.default_rng(n).uniform(size=(2, n, n, 3)).astype(np.float32)
    torch_x = torch.from_numpy(x).permute(0, 3, 1, 2)
    larger = F.interpolate(torch_x, (size, size), mode="bicubic", align_corners=True)
    want = (kornia_resize(torch_x, size) if size < n else larger).permute(0, 2, 3, 1)
    close(preprocess.aligned_resize(jnp.asarray(x), size), want, 2e-6)
